"""layer-sampling passes fedloom's battery, and gets round to every layer."""

import pytest
from fedloom_layer_sampling import LayerSampling

from fedloom.core.errors import ConfigError
from fedloom.core.registry import build, faults
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.strategies.conformance import StrategyConformance, run_round


class TestLayerSampling(StrategyConformance):
    """What holds for every strategy."""

    def strategy(self) -> LayerSampling:
        """The strategy under test."""
        return LayerSampling(layers=1)

    def schema(self) -> Schema:
        """Three layers and a head."""
        pairs = [
            TensorSpec(f"layer.{k}.{role}", f"layer.{k}", role, shape)
            for k in range(3)
            for role, shape in ((Role.LORA_A, (2, 5)), (Role.LORA_B, (4, 2)))
        ]
        return Schema((*pairs, TensorSpec("classifier.weight", "classifier", Role.HEAD, (3, 4))), 2.0)

    def test_one_layer_a_round_and_every_layer_in_time(self) -> None:
        """Two rounds in a row may draw the same; twelve leave none out."""
        strategy, state = self.begin()
        seen = []
        for _ in range(12):
            plan = strategy.plan(state, state.round, "ada")
            seen.append(state.schema.select(plan.train, but=["classifier.weight"]).names())
            state = run_round(strategy, state, self.updates(strategy, state))

        assert all(len(each) == 1 for each in seen)
        assert frozenset().union(*seen) == {f"layer.{k}.lora_B" for k in range(3)}


def test_it_is_found_by_name_and_needs_a_layer() -> None:
    assert faults("strategies", "layer-sampling") == []
    with pytest.raises(ConfigError, match="layers is 0; set a number of layers from 1 up"):
        build("strategies", "layer-sampling", {"layers": 0})
