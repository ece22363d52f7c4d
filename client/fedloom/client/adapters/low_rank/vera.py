"""VeRA: a frozen random pair is scaled on both sides (Kopiczko et al., ICLR 2024, arXiv 2310.11454).

W = W0 + diag(b) B diag(d) A. A and B are the same in all layers but for their sizes, and are never sent: everybody
draws them from a public seed.
"""

import math
from typing import ClassVar

import numpy as np
import torch
from peft import PeftModel
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from fedloom.client.adapters.api import Host, Traits
from fedloom.client.adapters.lora import Targets, linear_targets
from fedloom.client.adapters.numbered_layers import Layers
from fedloom.client.adapters.slot import Slot
from fedloom.client.adapters.wrapping import Wrapper, attach_around, matrix, sizes, unwrap, wrapped_slots
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, scale
from fedloom.core.config.parsing import Section
from fedloom.core.limits import MAX_RANK

__all__ = ["VeRA"]


class _ScaledPair(Wrapper):
    """y = W0 x + b ⊙ B (d ⊙ A x) + bias, with d of shape (r,) as its change from d0, and b of shape (out,)."""

    right: torch.Tensor
    left: torch.Tensor

    def __init__(self, inner: nn.Module, right: torch.Tensor, left: torch.Tensor, start: float) -> None:
        super().__init__(inner)
        outputs, inputs = sizes(inner)
        rank, self.start = len(right), start
        # Kaiming-uniform at each layer's own size, as in the paper.
        self.register_buffer("right", math.sqrt(6 / inputs) * right[:, :inputs], persistent=False)
        self.register_buffer("left", math.sqrt(6 / rank) * left[:outputs], persistent=False)
        self.vera_lambda_d = nn.Parameter(torch.zeros(rank))
        self.vera_lambda_b = nn.Parameter(torch.zeros(outputs))

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        y, low = self.given(x), F.linear(x.float(), self.right)
        high = F.linear(self.start * low + scale(low, self.vera_lambda_d, tape), self.left)
        return (y + scale(high, self.vera_lambda_b, tape)).to(y.dtype)

    def fold(self) -> None:
        scaled = self.left * (self.start + self.vera_lambda_d)
        matrix(self.inner).add_(self.vera_lambda_b[:, None] * (scaled @ self.right))


class VeRA(Section):
    """VeRA: W = W0 + diag(b) B diag(d) A with B and A random, frozen and never sent.

    Trained parameters: r, and one for each output, of a target layer. Their average is not that of the models, unless a
    strategy trains b or d alone.
    """

    traits: ClassVar[Traits] = Traits(peft=False)
    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    """Rank r; the paper takes 256 and more, which costs few parameters."""
    d_initial: float = Field(default=0.1, gt=0, le=100)
    """What d starts at; b starts at zero."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the frozen matrices. Public: everybody who trains or merges draws them."""
    targets: Targets = "auto"
    """Names (suffixes) of the linear layers, or as for LoRA."""
    layers: Layers = None
    """Numbers of the transformer layers that get it: 0 is the first, -1 the last. None: all."""

    def attach(self, host: Host) -> PeftModel:
        """The base model with a scaled pair beside every target layer.

        Raises:
            ModelError: No layer has one of the target names.
        """
        names = linear_targets(host.base, self.targets, host.head, self.layers)
        shapes = [sizes(host.base.get_submodule(name)) for name in names]
        right = _uniform(self.seed, 0, (max(inputs for _, inputs in shapes), self.rank)).t()
        left = _uniform(self.seed, 1, (max(outputs for outputs, _ in shapes), self.rank))
        start = self.d_initial
        return attach_around(host, self.targets, lambda layer: _ScaledPair(layer, right, left, start), self.layers)

    def slots(self, model: PeftModel) -> list[Slot]:
        """The vectors of every target layer, roles vera_lambda_d, as its change from `d_initial`, and vera_lambda_b."""
        return wrapped_slots(model)

    def merge(self, model: PeftModel) -> None:
        """Add diag(b) B diag(d) A to the weights."""
        unwrap(model)


def _uniform(seed: int, stream: int, shape: tuple[int, int]) -> torch.Tensor:
    """Values in [-1, 1) from the raw words of Philox, which every release of numpy and every machine has alike.

    A matrix of fewer rows is the beginning of one of more: what a layer gets does not depend on the others.
    """
    words = np.random.Philox(key=[seed, stream]).random_raw(math.prod(shape))
    values = (words >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1
    return torch.from_numpy(values.astype(np.float32).reshape(shape))
