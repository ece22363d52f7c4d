"""Bottleneck adapters: a small network behind every block (Houlsby et al., ICML 2019, arXiv 1902.00751)."""

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

__all__ = ["Bottleneck"]

_DRAWN = {"adapter_down": Start.KAIMING}


class _Network(Wrapper):
    """h = f(x), y = h + U GELU(D h + d) + u, with D of shape (m, out), U (out, m), d (m,) and u (out,)."""

    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__(inner)
        width, _ = sizes(inner)
        self.adapter_down = nn.Parameter(torch.zeros(size, width))
        self.adapter_down_bias = nn.Parameter(torch.zeros(size))
        self.adapter_up = nn.Parameter(torch.zeros(width, size))
        self.adapter_up_bias = nn.Parameter(torch.zeros(width))

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        h = self.given(x)
        low = F.gelu(shift(product(h.float(), self.adapter_down, tape), self.adapter_down_bias, tape))
        return (h + shift(product(low, self.adapter_up, tape), self.adapter_up_bias, tape)).to(h.dtype)


class Bottleneck(Section):
    """Bottleneck adapters: behind every block down to a few values, GELU, and up again beside a residual.

    Trained parameters: 2 m + 1 for each output of such a layer, and m. Their average is not that of the models. The
    paper draws both matrices near zero; here U is zero, and the model starts as the base model exactly.
    """

    traits: ClassVar[Traits] = Traits(peft=False, merges=False)
    size: int = Field(default=16, ge=1, le=4096)
    """Values m in the middle of each network."""
    after: After = "auto"
    """Ends of the names of the linear layers that get a network behind them, such as "output.dense". "auto": those that
    attention and feed-forward blocks end with."""
    layers: Layers = None
    """Numbers of the transformer layers that get networks: 0 is the first, -1 the last. None: all."""

    def attach(self, host: Host) -> PeftModel:
        """The base model with a network that adds nothing yet behind every block.

        Raises:
            ModelError: The base model has no such layer.
        """
        return attach_after(host, self.after, lambda layer: _Network(layer, self.size), self.layers)

    def slots(self, model: PeftModel) -> list[Slot]:
        """The tensors of every network, roles adapter_down, adapter_down_bias, adapter_up and adapter_up_bias."""
        return wrapped_slots(model, _DRAWN)

    def merge(self, model: PeftModel) -> None:
        """Refused.

        Raises:
            ModelError: Always.
        """
        raise ModelError(CANNOT_MERGE)
