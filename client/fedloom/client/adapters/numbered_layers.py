"""Which of a transformer's numbered layers an adapter is on: `layers`, PEFT's `layers_to_transform`.

Frozen lower layers are Telly-K's way to save time (Shi et al., ISSTA 2023, arXiv 2304.05216): no gradient goes further
back than the first layer with a trained parameter.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedloom.core.errors import ModelError

__all__ = ["Layers", "NumberedLayers", "in_layers", "numbered_layers"]

Layers = tuple[int, ...] | None
"""Numbers of transformer layers, from 0, or below 0 from the end: -1 is the last. None is all of the model."""


class NumberedLayers(NamedTuple):
    """The layers of one model that a run names."""

    lists: tuple[str, ...]
    """Full names of the lists that they are in."""
    numbers: tuple[int, ...]
    """Ascending, from 0."""

    def have(self, name: str) -> bool:
        """Whether a module or a parameter of this full name is inside one of them."""
        for each in self.lists:
            if name.startswith(f"{each}."):
                return int(name.removeprefix(f"{each}.").partition(".")[0]) in self.numbers
        return False


def numbered_layers(base: PreTrainedModel, layers: tuple[int, ...]) -> NumberedLayers:
    """The layers of these numbers.

    Models with several lists, such as one of attentions and one of feed-forward blocks, have them of one length. The
    convolutions of which models of waves begin are no such layers.

    Args:
        base: The model, with an adapter or without.
        layers: Numbers from 0, or below 0 from the end.

    Raises:
        ModelError: There is no number, the model has no layer of one, or it has no one list of layers.
    """
    kind, encoder = type(base).__name__, base.base_model
    before = "" if encoder is base else f"{base.base_model_prefix}."
    found: dict[str, int] = {}
    for name, module in encoder.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and any(map(_linear, module.modules())):
            found[name] = len(module)
    if len(set(found.values())) != 1:
        has = ", ".join(f"{before}{name} of {length}" for name, length in found.items()) or "none"
        raise ModelError(
            f"adapter.layers needs a model with one list of layers; {kind} has {has}; remove adapter.layers, and name "
            "layers by adapter.targets"
        )
    (count,) = set(found.values())
    missing = [number for number in layers if not -count <= number < count]
    if missing or not layers:
        raise ModelError(
            f"adapter.layers names {', '.join(map(str, missing)) or 'none'}; {kind} has {count} layers: name some of 0 "
            f"to {count - 1}, or of -1 (the last) to -{count}"
        )
    return NumberedLayers(tuple(f"{before}{name}" for name in found), tuple(sorted({n % count for n in layers})))


def in_layers(base: PreTrainedModel, layers: Layers, names: Iterable[str]) -> list[str]:
    """Those of the full names of modules or parameters that are inside the layers; all of them if `layers` is None.

    Raises:
        ModelError: As by `numbered_layers`.
    """
    if layers is None:
        return list(names)
    numbered = numbered_layers(base, layers)
    return [name for name in names if numbered.have(name)]


def _linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))
