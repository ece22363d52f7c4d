"""Compacter: bottleneck adapters of Kronecker products (Karimi Mahabadi et al., NeurIPS 2021, arXiv 2106.04647).

A matrix of a network is sum_i A_i ⊗ s_i t_iᵀ with n products. The A_i, n x n, are the same in all layers and in both
matrices of each; s_i and t_i are the layer's own. With x as a matrix X of n rows, (A ⊗ s tᵀ) x is A X t sᵀ.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from peft import PeftModel
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from fedloom.client.adapters.api import Host, Traits
from fedloom.client.adapters.bottleneck.block_ends import CANNOT_MERGE, After, attach_after
from fedloom.client.adapters.numbered_layers import Layers
from fedloom.client.adapters.slot import Slot
from fedloom.client.adapters.wrapping import Wrapper, sizes, wrapped_slots
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, product, shift
from fedloom.core.config.parsing import Section
from fedloom.core.errors import ModelError
from fedloom.core.schema import Start

__all__ = ["Compacter"]

_SHARED = "kronecker_"
_DRAWN = {"down_left": Start.KAIMING, "down_right": Start.KAIMING, "up_right": Start.KAIMING}


class _Network(Wrapper):
    """h = f(x), y = h + U GELU(D h + d) + u.

    D is sum_i A_i ⊗ s_i t_iᵀ with the s_i as columns of down_left, (m / n, n), and the t_i as rows of down_right,
    (n, out / n); U likewise, of up_left, (out / n, n), and up_right, (n, m / n) (equation 6 of the paper).
    """

    def __init__(self, inner: nn.Module, size: int, shared: list[nn.Parameter]) -> None:
        super().__init__(inner)
        (width, _), n = sizes(inner), len(shared)
        if width % n:
            raise ValueError(
                f"its {width} outputs are no multiple of adapter.products = {n}; set one of their divisors"
            )
        for index, each in enumerate(shared):
            self.register_parameter(f"{_SHARED}{index}", each)
        self.down_left = nn.Parameter(torch.zeros(size // n, n))
        self.down_right = nn.Parameter(torch.zeros(n, width // n))
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up_left = nn.Parameter(torch.zeros(width // n, n))
        self.up_right = nn.Parameter(torch.zeros(n, size // n))
        self.up_bias = nn.Parameter(torch.zeros(width))

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        h = self.given(x)
        low = shift(self._multiply(h.float(), self.down_left, self.down_right, tape), self.down_bias, tape)
        high = self._multiply(F.gelu(low), self.up_left, self.up_right, tape)
        return (h + shift(high, self.up_bias, tape)).to(h.dtype)

    def _multiply(self, x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, tape: Tape) -> torch.Tensor:
        """(sum_i A_i ⊗ s_i t_iᵀ) x, shape (batch, ..., n · len(left))."""
        n = len(right)
        low = product(x.reshape(*x.shape[:-1], n, -1), right, tape)  # (batch, ..., row of X, i)
        rows = [product(low[..., index], getattr(self, f"{_SHARED}{index}"), tape) for index in range(n)]
        return product(torch.stack(rows, -1), left, tape).flatten(-2)


class Compacter(Section):
    """Compacter: bottleneck adapters whose matrices are sums of Kronecker products, with factors that all layers share.

    Trained parameters: n³ in all, and for each layer 2 (out + m) and its biases, out + m. Their average is not that of
    the models. What the layers share gets one gradient from each example, the sum over the layers.
    """

    traits: ClassVar[Traits] = Traits(peft=False, merges=False)
    size: int = Field(default=16, ge=1, le=4096)
    """Values m in the middle of each network, a multiple of `products`."""
    products: int = Field(default=4, ge=1, le=64)
    """Products n in each matrix, a divisor of the layers' outputs; the paper takes 4 to 12."""
    after: After = "auto"
    """Ends of the names of the linear layers that get a network behind them, such as "output.dense". "auto": those that
    attention and feed-forward blocks end with. Compacter++ has those of the feed-forward blocks alone."""
    layers: Layers = None
    """Numbers of the transformer layers that get networks: 0 is the first, -1 the last. None: all."""

    def attach(self, host: Host) -> PeftModel:
        """The base model with a network that adds nothing yet behind every block.

        Raises:
            ModelError: The base model has no such layer, or `products` does not divide the sizes.
        """
        n = self.products
        if self.size % n:
            raise ModelError(
                f"adapter.size = {self.size} is no multiple of adapter.products = {n}; set one of them anew"
            )
        shared = [nn.Parameter(torch.zeros(n, n)) for _ in range(n)]
        return attach_after(host, self.after, lambda layer: _Network(layer, self.size, shared), self.layers)

    def slots(self, model: PeftModel) -> list[Slot]:
        """The A_i once, role kronecker, and the tensors of every network by their attributes' names."""
        shared: dict[str, Slot] = {}
        own: list[Slot] = []
        for slot in wrapped_slots(model, _DRAWN):
            if slot.spec.role.startswith(_SHARED):
                name = f"compacter.{slot.spec.role}"
                spec = replace(slot.spec, name=name, module="compacter", role="kronecker", start=Start.KAIMING)
                shared[name] = replace(slot, spec=spec)
            else:
                own.append(slot)
        return [*shared.values(), *own]

    def merge(self, model: PeftModel) -> None:
        """Refused.

        Raises:
            ModelError: Always.
        """
        raise ModelError(CANNOT_MERGE)
