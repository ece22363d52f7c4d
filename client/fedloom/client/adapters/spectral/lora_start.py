"""LoRA's starts from the pretrained weight.

PiSSA (Meng et al., NeurIPS 2024, arXiv 2404.02948) and OLoRA (Büyükakyüz, 2024, arXiv 2406.01775) make a pair of W0
itself, s B0 A0, and train from there: W = (W0 - s B0 A0) + s B A, which at the start is W0. They read public weights
alone, so nothing private is in them. Every party finds B0 and A0 by itself, in float64 and with fixed signs; the
changes A - A0 and B - B0 travel, which are zero before the first round. So all begin with W0, though the last bits of
B0 and A0 may differ between two machines.
"""

from collections.abc import Callable, Iterable
from typing import Final

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from fedloom.client.adapters.slot import Slot
from fedloom.client.adapters.spectral.basis import leading_singular
from fedloom.core.errors import ModelError
from fedloom.core.schema import Array, Role, Start, TensorSpec

__all__ = ["FROM_WEIGHTS", "begin_from_weights", "change", "taken_out"]

Factors = tuple[torch.Tensor, torch.Tensor]

_LEAST_PIVOT = 1e-8
"""Least length of a column beyond the span of those before it, relative to the longest: under it the QR decomposition
has a direction that rounding chose."""


def _pissa(weight: torch.Tensor, rank: int, scale: float) -> Factors:
    """B = U_r S_r^(1/2) and A = S_r^(1/2) V_rᵀ (equations 2 and 3), with S over s: s B A is the leading part of W0."""
    left, values, right = leading_singular(weight, rank)
    roots = (values / scale).sqrt()
    return left * roots, roots[:, None] * right


def _olora(weight: torch.Tensor, rank: int, scale: float) -> Factors:
    """B = Q_r and A = R_r of W0 = Q R (OLoRA, section 3), the diagonal of R positive; s is a factor beside them."""
    if rank > min(weight.shape):
        raise ValueError(
            f"adapter.rank = {rank} is above the {min(weight.shape)} rows of its R; lower it, or name other layers"
        )
    exact = weight.detach().to("cpu", torch.float64)
    basis, upper = torch.linalg.qr(exact[:, :rank])
    pivots = upper.diagonal()
    if not bool((pivots.abs() > _LEAST_PIVOT * torch.linalg.vector_norm(exact, dim=0).max()).all()):
        raise ValueError(
            f"its first {rank} columns are linearly dependent, so its QR decomposition is not determined; lower "
            "adapter.rank, or name other layers"
        )
    basis = basis * pivots.sign()
    return basis.to(weight), (basis.t() @ exact).to(weight)


FROM_WEIGHTS: Final[dict[str, Callable[[torch.Tensor, int, float], Factors]]] = {"pissa": _pissa, "olora": _olora}
"""By name: from a weight (out, in), r and s to B (out, r) and A (r, in)."""


@torch.no_grad()
def begin_from_weights(model: PeftModel, start: str, scale: float) -> None:
    """Give every pair its factors, and take their product out of the frozen weight.

    Args:
        model: With pairs as PEFT makes them.
        start: A name in `FROM_WEIGHTS`.
        scale: s.

    Raises:
        ModelError: A weight is not in float32, is that of the embeddings too, or does not determine the factors.
    """
    embeddings = model.get_input_embeddings().weight
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if weight.dtype != torch.float32:
            raise ModelError(
                f'layer {name}: adapter.start = "{start}" takes a part out of the pretrained weight, which is then '
                f'rounded in {weight.dtype}; set compute.dtype = "float32" and compute.quantization = "none"'
            )
        if weight is embeddings:
            raise ModelError(
                f'layer {name} shares its weight with the embeddings, which adapter.start = "{start}" would change '
                "too; name other layers in adapter.targets"
            )
        matrix = weight.t() if layer.fan_in_fan_out else weight
        try:
            left, right = FROM_WEIGHTS[start](matrix, len(a), scale)
        except ValueError as error:
            raise ModelError(f"layer {name}: {error}") from None
        b.copy_(left)
        a.copy_(right)
        matrix.copy_(matrix.double() - scale * left.double() @ right.double())


def change(start: str, module: str, role: str, factor: nn.Parameter) -> Slot:
    """The slot of a factor that `begin_from_weights` has made: it travels as its change.

    A has a role of its own, so that no strategy takes the product of two changes for that of the factors; one that
    trains B alone finds it.
    """
    side = role.rpartition("_")[2]
    own = role if role == Role.LORA_B else f"{start}_{side}"
    spec = TensorSpec(f"{module}.{start}_{side}", module, own, tuple(factor.shape), Start.ZERO)
    return Slot(spec, factor, origin=factor.detach().clone())


def taken_out(slots: Iterable[Slot]) -> dict[str, Array]:
    """What such pairs miss beside the pretrained weights, -s B0 A0, by the names of corrections in a broadcast.

    Returns:
        MODULE.base_A = A0, shape (r, in), and MODULE.base_B = -B0, shape (out, r); nothing for other pairs.
    """
    found: dict[str, Array] = {}
    for slot in slots:
        start, _, side = slot.spec.name.rpartition(".")[2].partition("_")
        if start in FROM_WEIGHTS and slot.origin is not None:
            factor = -slot.origin if side == "B" else slot.origin
            found[f"{slot.spec.module}.base_{side}"] = factor.to("cpu", torch.float32).numpy()
    return found
