"""MiSS: one matrix D, tiled over the inputs, is added to the weight (Kang and Yin, 2024, arXiv 2409.15371).

The inputs are cut into shards of r, the last of which may be shorter. W = W0 + [Dᵀ Dᵀ ...], so y = W0 x + Dᵀ Σ x_shard:
a sum and a small linear layer. It was published as Bone first; PEFT has it as MissConfig.
"""

from typing import ClassVar

import torch
from peft import PeftModel
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from fedloom.client.adapters.api import Host, Traits
from fedloom.client.adapters.lora import Targets
from fedloom.client.adapters.numbered_layers import Layers
from fedloom.client.adapters.slot import Slot
from fedloom.client.adapters.wrapping import Wrapper, attach_around, matrix, sizes, unwrap, wrapped_slots
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, product
from fedloom.core.config.parsing import Section
from fedloom.core.limits import MAX_RANK

__all__ = ["MiSS"]


class _Sharded(Wrapper):
    """y = W0 x + Dᵀ Σ_k x[k r : (k + 1) r] + b, with D of shape (r, out) as PEFT has it."""

    def __init__(self, inner: nn.Module, rank: int) -> None:
        super().__init__(inner)
        outputs, inputs = sizes(inner)
        if rank > inputs:
            raise ValueError(f"adapter.rank = {rank} is above its {inputs} inputs; lower it, or name other layers")
        self.miss_block = nn.Parameter(torch.zeros(rank, outputs))

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        y, rank = self.given(x), len(self.miss_block)
        padded = F.pad(x.float(), (0, -x.shape[-1] % rank))
        shards = padded.reshape(*x.shape[:-1], -1, rank)
        return (y + product(shards.sum(-2), self.miss_block, tape, transposed=True)).to(y.dtype)

    def fold(self) -> None:
        weight = matrix(self.inner)
        shards = -(-weight.shape[1] // len(self.miss_block))
        weight.add_(self.miss_block.t().repeat(1, shards)[:, : weight.shape[1]])


class MiSS(Section):
    """MiSS: W = W0 + D, where every shard of r inputs shares one r x out matrix D.

    Trained parameters: r for each output of a target layer; LoRA has r for each input too. Their average is exact.
    """

    traits: ClassVar[Traits] = Traits(exact_average=True, peft=False)
    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    """Inputs in a shard; the rank of the change is at most that."""
    targets: Targets = "auto"
    """Names (suffixes) of the linear layers, or as for LoRA."""
    layers: Layers = None
    """Numbers of the transformer layers that get it: 0 is the first, -1 the last. None: all."""

    def attach(self, host: Host) -> PeftModel:
        """The base model with a D of zeros on every target layer.

        Raises:
            ModelError: No layer has one of the target names, or one has fewer inputs than the rank.
        """
        return attach_around(host, self.targets, lambda layer: _Sharded(layer, self.rank), self.layers)

    def slots(self, model: PeftModel) -> list[Slot]:
        """D of every target layer, shape (r, out), role miss_block."""
        return wrapped_slots(model)

    def merge(self, model: PeftModel) -> None:
        """Add D to every shard of the weights."""
        unwrap(model)
