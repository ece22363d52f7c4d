"""A second model on the same frozen weights, so that two threads can train at once."""

import copy
from typing import Any

from torch import nn

from fedloom.client.models.adapter_model import AdapterModel

__all__ = ["twin"]


def twin(model: AdapterModel) -> AdapterModel:
    """The same model with an adapter of its own; the frozen weights take no memory again.

    Each may be trained, corrected and read whatever the other does. Neither may have hooks at this moment.
    """
    trained = {id(slot.parameter) for slot in model.slots.values()}
    known: dict[int, Any] = {id(model.tokenizer): model.tokenizer}
    for parameter in model.model.parameters():
        if id(parameter) not in trained:
            # A parameter of its own: a correction gives it other values and leaves those that are shared.
            known[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(model, known)
