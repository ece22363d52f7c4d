"""The frozen weights that an adapter adds to, as arrays."""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from transformers.pytorch_utils import Conv1D

from fedloom.client.models.base_folder import base_digest, resolve_base
from fedloom.client.models.load import load_base
from fedloom.client.tasks.api import task_named
from fedloom.core.errors import ModelError

__all__ = ["base_weights"]

_SHORT = 8
"""Tokens that any model can read."""


def base_weights(
    base: str, digest: str | None, task: str, labels: int, modules: Iterable[str]
) -> Iterator[tuple[str, npt.NDArray[np.float64]]]:
    """W0 of each of these layers, shape (out, in), float64, one at a time.

    Args:
        base: A folder, an asset or a model of the hub cache, as in a run file.
        digest: What it must have; None takes any.
        task: Of the run.
        labels: Number of its labels.
        modules: Names of linear layers in the base model.

    Raises:
        ModelError: The base model cannot be loaded, is another one, or has no such layer.
    """
    folder = resolve_base(base)
    if digest is not None and (found := base_digest(folder)) != digest:
        raise ModelError(
            f"base model {base!r} has digest {found}; the adapter was trained with {digest}; get the same files"
        )
    model = load_base(folder, task_named(task, tuple(f"LABEL_{index}" for index in range(labels)), _SHORT)).model
    for module in modules:
        try:
            layer = model.get_submodule(module)
            weight = layer.get_parameter("weight")
        except AttributeError as error:
            raise ModelError(
                f"base model {base!r} has no weight {module}; give the adapter's own base model"
            ) from error
        with torch.no_grad():
            yield module, (weight.T if isinstance(layer, Conv1D) else weight).double().cpu().numpy()
