"""RoLoRA passes fedloom's battery, alternates, and averages exactly in both halves."""

import numpy as np
import pytest
from fedloom_rolora import RoLoRA

from fedloom.core.errors import SchemaError
from fedloom.core.registry import build, entries
from fedloom.core.schema import Role
from fedloom.strategies.conformance import StrategyConformance, effective, respond, run_round
from fedloom.strategies.start import starting_adapter


class TestRoLoRA(StrategyConformance):
    """fedloom's battery, and what the paper adds to it."""

    def strategy(self) -> RoLoRA:
        """The strategy under test."""
        return RoLoRA()

    def test_factors_take_turns_and_b_is_first(self) -> None:
        """Only one factor moves in a round."""
        strategy, state = self.begin()
        turns = []
        for _ in range(4):
            turns.append(strategy.plan(state, state.round, "ada").train - {Role.HEAD})
            state = run_round(strategy, state, self.updates(strategy, state))

        assert turns == [{Role.LORA_B}, {Role.LORA_A}, {Role.LORA_B}, {Role.LORA_A}]

    def test_the_model_is_the_mean_of_the_clients_models(self) -> None:
        """The average is exact whichever factor moves."""
        strategy, state = self.begin()
        for index in range(4):
            plan = strategy.plan(state, state.round, "ada")
            updates = [respond(state.schema, plan, name, 10 * index + k) for k, name in enumerate(("ada", "bo", "cy"))]
            models = [effective(state.schema, {**u.start, **{n: u.value(n) for n in u.delta}}) for u in updates]
            shares = np.array([u.weight for u in updates]) / sum(u.weight for u in updates)

            state = run_round(strategy, state, updates)

            for name, tensor in effective(state.schema, state.adapter).items():
                expected = np.tensordot(shares, np.stack([model[name] for model in models]), axes=1)
                np.testing.assert_allclose(tensor, expected, atol=1e-5)

    def test_an_adapter_without_pairs_is_refused(self) -> None:
        """There is nothing to alternate."""
        schema = self.schema().select({Role.HEAD})
        with pytest.raises(SchemaError, match="trains lora_B, but the adapter has head"):
            RoLoRA().init(schema, starting_adapter(schema, 0), 0)


def test_it_is_found_by_name() -> None:
    assert build("strategies", "my-rolora", {"train_head": False}) == RoLoRA(train_head=False)
    assert entries("strategies")["my-rolora"].distribution == "fedloom-rolora"
