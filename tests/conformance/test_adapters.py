"""The adapter kinds that come with fedloom, under the battery that strangers' kinds are held to."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from fedloom.client.adapters.api import Traits
from fedloom.client.adapters.bias import Bias
from fedloom.client.adapters.bottleneck.compacter import Compacter
from fedloom.client.adapters.bottleneck.houlsby import Bottleneck
from fedloom.client.adapters.head_only import HeadOnly
from fedloom.client.adapters.layer_norm import LayerNorm
from fedloom.client.adapters.lora import LoRA
from fedloom.client.adapters.low_rank.dual_lora import DualLoRA
from fedloom.client.adapters.low_rank.hydra import Hydra
from fedloom.client.adapters.low_rank.tucker import Tucker
from fedloom.client.adapters.low_rank.vera import VeRA
from fedloom.client.adapters.miss import MiSS
from fedloom.client.adapters.scaling.ia3 import IA3
from fedloom.client.adapters.scaling.peqa import PEQA
from fedloom.client.adapters.scaling.ssf import SSF
from fedloom.client.adapters.sparse.dsee import DSEE
from fedloom.client.adapters.sparse.entries import Sparse
from fedloom.client.adapters.spectral.lora_sb import LoRASB
from fedloom.client.adapters.spectral.svfit import SVFit
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, recording, rule, scale
from fedloom.conformance.adapters import AdapterConformance
from fedloom.core.errors import ModelError


class TestLoRA(AdapterConformance):
    def adapter(self) -> LoRA:
        return LoRA(rank=3, alpha=6, targets=("query", "dense"))


class TestRsLoRA(AdapterConformance):
    def adapter(self) -> LoRA:
        return LoRA(rank=4, alpha=6, targets=("query", "dense"), rslora=True)


class TestDoRA(AdapterConformance):
    def adapter(self) -> LoRA:
        return LoRA(rank=3, alpha=6, targets=("query", "dense"), dora=True)


class TestOrthogonalLoRA(AdapterConformance):
    def adapter(self) -> LoRA:
        return LoRA(rank=3, alpha=6, targets=("query", "dense"), start="orthogonal")


class TestPiSSA(AdapterConformance):
    def adapter(self) -> LoRA:
        return LoRA(rank=3, alpha=6, targets=("query", "dense"), start="pissa")


class TestOLoRA(AdapterConformance):
    def adapter(self) -> LoRA:
        return LoRA(rank=3, alpha=6, targets=("query", "dense"), start="olora", dora=True)


class TestBias(AdapterConformance):
    def adapter(self) -> Bias:
        return Bias()


class TestHeadOnly(AdapterConformance):
    def adapter(self) -> HeadOnly:
        return HeadOnly()


class TestLayerNorm(AdapterConformance):
    def adapter(self) -> LayerNorm:
        return LayerNorm()


class TestIA3(AdapterConformance):
    def adapter(self) -> IA3:
        return IA3(targets=("key", "value", "dense"), feedforward=("dense",))


class TestSSF(AdapterConformance):
    def adapter(self) -> SSF:
        return SSF(targets=("query", "dense"))


class TestPEQA(AdapterConformance):
    def adapter(self) -> PEQA:
        return PEQA(targets=("query", "dense"))


class TestMiSS(AdapterConformance):
    def adapter(self) -> MiSS:
        return MiSS(rank=5, targets=("query", "dense"))  # 32 inputs are six shards of 5 and a rest


class TestLoRASB(AdapterConformance):
    def adapter(self) -> LoRASB:
        return LoRASB(rank=3, alpha=6, targets=("query", "dense"))


class TestSVFit(AdapterConformance):
    def adapter(self) -> SVFit:
        return SVFit(rank=4, targets=("query", "dense"))


class TestSparse(AdapterConformance):
    def adapter(self) -> Sparse:
        return Sparse(share=0.1, targets=("query", "dense"))


class TestPrincipalEntries(AdapterConformance):
    def adapter(self) -> Sparse:
        return Sparse(share=0.05, mask="principal", rank=4, targets=("query", "dense"))


class TestDSEE(AdapterConformance):
    def adapter(self) -> DSEE:
        return DSEE(rank=3, alpha=6, entries=40, targets=("query", "dense"))


class TestVeRA(AdapterConformance):
    def adapter(self) -> VeRA:
        return VeRA(rank=3, targets=("query", "dense"))


class TestDualLoRA(AdapterConformance):
    def adapter(self) -> DualLoRA:
        return DualLoRA(rank=3, alpha=6, targets=("query", "dense"))


class TestHydra(AdapterConformance):
    def adapter(self) -> Hydra:
        return Hydra(rank=3, targets=("query", "dense"))


class TestTucker(AdapterConformance):
    def adapter(self) -> Tucker:
        return Tucker(rank=3, targets=("query", "dense"))


class TestLoRAOnTheLastLayer(AdapterConformance):
    def adapter(self) -> LoRA:
        return LoRA(rank=3, alpha=6, targets=("query", "dense"), layers=(-1,))


class TestBiasOfTheLastLayer(AdapterConformance):
    def adapter(self) -> Bias:
        return Bias(layers=(-1,))


class TestLayerNormOfTheLastLayer(AdapterConformance):
    def adapter(self) -> LayerNorm:
        return LayerNorm(layers=(-1,))


class TestBottleneck(AdapterConformance):
    def adapter(self) -> Bottleneck:
        return Bottleneck(size=5)


class TestCompacter(AdapterConformance):
    def adapter(self) -> Compacter:
        return Compacter(size=8, products=4)


class NotPrivate(LoRA):
    """A kind that says it is not for private runs."""

    traits: ClassVar[Traits] = Traits(private=False)


class TestNotPrivate(AdapterConformance):
    def adapter(self) -> NotPrivate:
        return NotPrivate(rank=2, targets=("query",))


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        return scale(x, self.gain, tape)


class Squared(Gain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain**2


def test_a_layer_brings_its_own_rule_and_a_subclass_does_not_inherit_it() -> None:
    model, x = nn.Sequential(Gain()), torch.arange(12.0).view(3, 4)
    with recording(model, list(model.parameters())) as tape:
        tape.begin(3)
        torch.autograd.backward(model(x).sum())
        tape.finish()
        torch.testing.assert_close(tape.flat, x)

    assert rule(Squared) is None
    strange = nn.Sequential(Squared())
    with pytest.raises(ModelError, match="Squared"), recording(strange, list(strange.parameters())):
        pass


def test_the_battery_sees_a_merge_that_does_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A kind whose forward its merge does not fold in."""

    class Doubled(LoRA):
        """Forgets to halve."""

        traits: ClassVar[Traits] = Traits(peft=False)

        def merge(self, model: object) -> None:
            for name, parameter in model.named_parameters():  # type: ignore[attr-defined]
                if ".lora_B." in name:
                    parameter.data.mul_(2)

    class Battery(AdapterConformance):
        def adapter(self) -> Doubled:
            return Doubled(rank=2, targets=("query",))

    battery = Battery()
    folder = battery.base(tmp_path_factory.mktemp("tiny"))
    model: AdapterModel = battery.load(folder)
    model.load(battery.values(model.schema))
    with pytest.raises(AssertionError, match="not close"):
        battery.test_merging_equals_the_forward_pass(model, folder)
