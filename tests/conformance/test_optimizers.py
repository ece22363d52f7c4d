"""The optimisers that come with fedloom, under the battery that strangers' optimisers are held to."""

import pytest

from fedloom.client.optimizers.adam import Adam
from fedloom.client.optimizers.adamw import AdamW
from fedloom.client.optimizers.galore import GaLore
from fedloom.client.optimizers.muon import Muon
from fedloom.client.optimizers.sgd import SGD
from fedloom.client.optimizers.spectrum import SpectrumSGD
from fedloom.conformance.optimizers import OptimizerConformance


class TestSGD(OptimizerConformance):
    def optimizer(self) -> SGD:
        return SGD()


class TestMomentum(OptimizerConformance):
    def optimizer(self) -> SGD:
        return SGD(momentum=0.9)


class TestSmoothedSGD(OptimizerConformance):
    def optimizer(self) -> SGD:
        return SGD(momentum=0.5, smoothing=True)


class TestAdam(OptimizerConformance):
    def optimizer(self) -> Adam:
        return Adam()


class TestAdamW(OptimizerConformance):
    def optimizer(self) -> AdamW:
        return AdamW(weight_decay=3.0)


class TestCorrectedAdamW(OptimizerConformance):
    def optimizer(self) -> AdamW:
        return AdamW(noise_correction=True)


class TestMuon(OptimizerConformance):
    def optimizer(self) -> Muon:
        return Muon(momentum=0.9)


class TestSpectrum(OptimizerConformance):
    def optimizer(self) -> SpectrumSGD:
        return SpectrumSGD()


class TestSpectrumWithMomentum(OptimizerConformance):
    def optimizer(self) -> SpectrumSGD:
        return SpectrumSGD(momentum=0.9)


class TestGaLore(OptimizerConformance):
    def optimizer(self) -> GaLore:
        return GaLore(projection_rank=2, period=2, scale=1.0)


def test_the_battery_sees_a_bound_that_is_too_small() -> None:
    class Hasty(SGD):
        """SGD that claims half of its way."""

        def longest_move(self, steps: int, rate: float, gradient: float, values: int, pull: float) -> float:
            return super().longest_move(steps, rate, gradient, values, pull) / 2

    class Battery(OptimizerConformance):
        def optimizer(self) -> Hasty:
            return Hasty()

    with pytest.raises(AssertionError):
        Battery().test_the_longest_move_bounds_every_round()


def test_the_battery_sees_a_claim_about_noise_that_is_wrong() -> None:
    class Vain(SGD):
        """SGD that claims half of what noise moves."""

        def noise_moved(self, steps: int, rate: float, noise_std: float) -> float | None:
            known = super().noise_moved(steps, rate, noise_std)
            return None if known is None else known / 2

    class Battery(OptimizerConformance):
        def optimizer(self) -> Vain:
            return Vain(momentum=0.9)

    with pytest.raises(AssertionError):
        Battery().test_what_noise_moves_is_known_if_claimed()
