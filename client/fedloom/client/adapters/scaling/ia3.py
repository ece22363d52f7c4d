"""(IA)³: what chosen layers give, or take, is scaled value by value (Liu et al., NeurIPS 2022, arXiv 2205.05638).

In a transformer the paper scales the keys, the values and what enters the second layer of each feed-forward block.
"""

from typing import ClassVar

import torch
from peft import PeftModel
from torch import nn

from fedloom.client.adapters.api import Host, Traits
from fedloom.client.adapters.lora import Targets, linear_targets
from fedloom.client.adapters.numbered_layers import Layers
from fedloom.client.adapters.slot import Slot
from fedloom.client.adapters.wrapping import Wrapper, attach_around, matrix, plain, sizes, unwrap, wrapped_slots
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, scale
from fedloom.core.config.parsing import Section
from fedloom.core.errors import ModelError

__all__ = ["IA3"]


class _Outputs(Wrapper):
    """y = (1 + l) ⊙ (W x + b): section 3.3's scale of keys and values, as its change from one, shape (out,)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.ia3_l = nn.Parameter(torch.zeros(sizes(inner)[0]))

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        y = self.given(x)
        return (y + scale(y, self.ia3_l, tape)).to(y.dtype)

    def fold(self) -> None:
        matrix(self.inner).mul_(1 + self.ia3_l[:, None])
        if (bias := plain(self.inner).bias) is not None:
            bias.mul_(1 + self.ia3_l)


class _Inputs(Wrapper):
    """y = W ((1 + l) ⊙ x) + b: section 3.3's scale within a feed-forward block, shape (in,)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.ia3_l = nn.Parameter(torch.zeros(sizes(inner)[1]))

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        return self.given((x + scale(x, self.ia3_l, tape)).to(x.dtype))

    def fold(self) -> None:
        matrix(self.inner).mul_(1 + self.ia3_l)


class IA3(Section):
    """(IA)^3: a learned scale of what each target layer gives, or takes.

    Trained parameters: one for each output, or input, of a target layer. Their average is exact.
    """

    traits: ClassVar[Traits] = Traits(exact_average=True, peft=False)
    targets: Targets = "auto"
    """Names (suffixes) of the linear layers whose outputs are scaled, or as for LoRA; the paper scales
    keys and values."""
    feedforward: tuple[str, ...] = ()
    """Those of the target names whose layers have their inputs scaled instead: the second of a feed-forward block."""
    layers: Layers = None
    """Numbers of the transformer layers that get it: 0 is the first, -1 the last. None: all."""

    def attach(self, host: Host) -> PeftModel:
        """The base model with a scale of one on every target layer.

        Raises:
            ModelError: No layer has one of the target names, or a name in `feedforward` is none of them.
        """
        names = linear_targets(host.base, self.targets, host.head, self.layers)
        last = {name.rpartition(".")[2] for name in names}
        if others := sorted(set(self.feedforward) - last):
            raise ModelError(
                f"adapter.feedforward names {', '.join(others)}, which is no target; the targets are "
                f"{', '.join(sorted(last))}: name some of these, or add it to adapter.targets"
            )
        inputs = {id(host.base.get_submodule(name)) for name in names if name.rpartition(".")[2] in self.feedforward}
        return attach_around(
            host,
            self.targets,
            lambda layer: _Inputs(layer) if id(plain(layer)) in inputs else _Outputs(layer),
            self.layers,
        )

    def slots(self, model: PeftModel) -> list[Slot]:
        """One vector for each target layer, role ia3_l, as its change from one."""
        return wrapped_slots(model)

    def merge(self, model: PeftModel) -> None:
        """Scale the rows, or the columns, of the weights."""
        unwrap(model)
