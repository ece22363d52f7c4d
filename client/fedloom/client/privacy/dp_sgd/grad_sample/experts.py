"""Mixtures of experts: which layers are routers, and what of such a model can be trained with a gradient per example.

A router sends every token to a few of many feed-forward blocks, the experts (Shazeer et al., ICLR 2017, arXiv
1701.06538). Attention before it sees examples apart, as in any model. These do not:

- A router is kept from sending all tokens to one expert by an auxiliary loss, which counts the tokens of all examples.
- An expert sees the tokens that were sent to it, of all examples, in one matrix: its first axis is not the examples.
- An expert of limited capacity takes the tokens that come first: one example pushes another's out (Lepikhin et al.,
  GShard, ICLR 2021, arXiv 2006.16668).
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from fedloom.core.errors import ModelError

__all__ = ["check_mixture", "inside", "routers"]

_NAMES = ("gate", "router")
"""What models call the router beside their experts, if transformers does not know its class."""
_EXPERTS = "experts"
_LIMIT = "expert_capacity"
"""What a router has that counts the tokens of an expert: NLLB's over the batch."""


def routers(model: nn.Module) -> tuple[str, ...]:
    """Full names of a model's routers: modules of which transformers records router logits, or named so by experts.

    A model without experts has none, whatever its layers are called.
    """
    recorded = {each for module in model.modules() for each in _recorded(module)}
    beside = {
        f"{name}.{each}".removeprefix(".")
        for name, module in model.named_modules()
        if hasattr(module, _EXPERTS)
        for each in _NAMES
        if isinstance(getattr(module, each, None), nn.Module)
    }
    return tuple(
        name
        for name, module in model.named_modules()
        if name in beside or any(type(module) is kind and name.endswith(end) for kind, end in recorded)
    )


def check_mixture(model: nn.Module, names: list[str]) -> None:
    """Refuse what of a mixture of experts has no gradient per example.

    Args:
        model: Any model; one without experts passes.
        names: Full names of the trained parameters.

    Raises:
        ModelError: One is of a router or an expert, or the experts' capacity is limited.
    """
    found = routers(model)
    if not found:
        return
    for name in names:
        if inside(name, found):
            raise ModelError(
                f"trained parameter {name!r} is of a mixture-of-experts router, whose balance is a matter of all "
                "examples' tokens and cannot be clipped per example; leave the router out of adapter.targets"
            )
        if _EXPERTS in name.split("."):
            raise ModelError(
                f"trained parameter {name!r} is of an expert, which sees the tokens of all examples in one matrix, so "
                'that it has no gradient per example; train attention: set adapter.targets = "auto"'
            )
    if (limited := next((name for name, each in model.named_modules() if hasattr(each, _LIMIT)), None)) is not None:
        raise ModelError(
            f"the experts of {limited!r} take a limited number of tokens, so that one example's can push another's out "
            "and no clip bounds what it changes; take a model without a limit on its experts"
        )


def inside(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a full name is that of one of the modules, or of something in it."""
    return any(name == each or name.startswith(f"{each}.") for each in modules)


def _recorded(module: nn.Module) -> Iterator[tuple[type[nn.Module], str]]:
    """The classes, and the ends of full names, of what transformers collects as a model's `router_logits`."""
    recorders: Any = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
    for each in recorders if isinstance(recorders, (list, tuple)) else (recorders,):
        kind, end = getattr(each, "target_class", each), getattr(each, "layer_name", None)
        if isinstance(kind, type):
            yield kind, end or ""
