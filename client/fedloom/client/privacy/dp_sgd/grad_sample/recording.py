"""Route a model's trained layers through a tape."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from fedloom.client.privacy.dp_sgd.grad_sample.experts import check_mixture
from fedloom.client.privacy.dp_sgd.grad_sample.hooks import HOOKED, hooked
from fedloom.client.privacy.dp_sgd.grad_sample.layers import rule
from fedloom.client.privacy.dp_sgd.grad_sample.layouts import flattened, positions_by_example
from fedloom.client.privacy.dp_sgd.grad_sample.owners import names_of, owners
from fedloom.client.privacy.dp_sgd.grad_sample.tape import Tape

__all__ = ["recording"]


@contextmanager
def recording(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[Tape]:
    """Record the per-example gradients of `parameters` while the context lasts.

    For each microbatch: `tape.begin(examples)`, forward, backward on the sum of per-example losses,
    `PrivateOptimizer.accumulate()`. Right under gradient checkpointing of both kinds. If a trained layer is of a kind
    that only Opacus's hooks know, all of them go through the hooks.

    Raises:
        ModelError: A trained parameter belongs to a layer that is not supported, or to a router or an expert.
    """
    names = names_of(model, parameters)
    check_mixture(model, list(names.values()))
    layers = owners(model, names, lambda kind: rule(kind) or kind in HOOKED)
    rules = {name: found for name, module in layers.items() if (found := rule(type(module)))}
    if rules.keys() != layers.keys():
        with hooked(model, parameters) as tape:
            yield tape
        return
    tape = Tape(parameters, names, flattened(model, parameters))
    try:
        for name, module in layers.items():
            module.forward = partial(rules[name], module, tape)
        with positions_by_example(model, parameters):
            yield tape
    finally:
        for module in layers.values():
            module.__dict__.pop("forward", None)
        tape.withdraw()
