"""Models that give a layer other rows than one for each example, and how the gradients are told apart all the same.

Known by the full name of a class, since only its code says in which order the rows lie; whatever is not listed here is
refused by the tape. The tests hold each of these against a loop over the examples, and the probe does so again for the
very model of a private run.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["flattened", "positions_by_example"]

_FLATTENED = {
    "transformers.models.opt.modeling_opt.OPTDecoderLayer": ("fc1", "fc2"),
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock": ("shared_expert", "shared_expert_gate"),
    "transformers.models.swin.modeling_swin.SwinAttention": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
"""Modules, and what in them sees (examples · k, ...) with the k rows of an example beside each other: its tokens, or
the windows of a picture."""

_DISENTANGLED = "transformers.models.deberta_v2.modeling_deberta_v2.DisentangledSelfAttention"
_OF_POSITIONS = ("query_proj", "key_proj", "pos_query_proj", "pos_key_proj")


def flattened(model: nn.Module, parameters: Iterable[nn.Parameter]) -> frozenset[nn.Parameter]:
    """Those of the parameters whose layers see k rows in turn for each example, instead of one."""
    inside = {
        parameter
        for module in model.modules()
        for name in _FLATTENED.get(_kind(module), ())
        if isinstance(layer := getattr(module, name, None), nn.Module)
        for parameter in layer.parameters()
    }
    return frozenset(inside.intersection(parameters))


@contextmanager
def positions_by_example(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Have DeBERTa project its relative positions once for each example, where these projections are trained.

    They are the same for every example, so that the model projects them once for a batch, and their gradient would be
    the batch's sum. The result is the model's own.
    """
    trained, patched = set(parameters), []
    for module in model.modules():
        if _kind(module) == _DISENTANGLED:
            layers: list[Any] = [getattr(module, name, None) for name in _OF_POSITIONS]
            if any(not trained.isdisjoint(layer.parameters()) for layer in layers if layer is not None):
                patched.append(module)
    try:
        for module in patched:
            module.disentangled_attention_bias = _Bias(module)  # type: ignore[assignment]  # in its method's place
        yield
    finally:
        for module in patched:
            module.__dict__.pop("disentangled_attention_bias", None)


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


class _Bias:
    """A DisentangledSelfAttention's method, run with an `_Expanded` in place of the module."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, query: torch.Tensor, *given: Any) -> torch.Tensor:
        method: Any = type(self._module).disentangled_attention_bias
        found: torch.Tensor = method(_Expanded(self._module, query), query, *given)
        return found


class _Expanded:
    """The module, but its projections of positions give a row for each example, and no result is to be repeated.

    The method repeats them `len(query) // num_attention_heads` times, so that to it all heads of the batch are heads.
    """

    def __init__(self, module: Any, query: torch.Tensor) -> None:
        self._module, self.num_attention_heads = module, len(query)
        self._batch = len(query) // module.num_attention_heads

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return (lambda x: found(x.expand(self._batch, -1, -1))) if name in _OF_POSITIONS else found

    def transpose_for_scores(self, x: torch.Tensor, _: int) -> torch.Tensor:
        """(batch, positions, width) as (batch · heads, positions, values)."""
        found: torch.Tensor = self._module.transpose_for_scores(x, self._module.num_attention_heads)
        return found
