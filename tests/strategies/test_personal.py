"""FedSA-LoRA: one factor is averaged, the other never leaves its client."""

import numpy as np
import pytest

from fedloom.core.schema import Role
from fedloom.strategies.conformance import StrategyConformance, run_round
from fedloom.strategies.personal.fedsa import FedSALoRA


class TestSharedB(StrategyConformance):
    def strategy(self) -> FedSALoRA:
        return FedSALoRA(shared="B")


@pytest.mark.parametrize(("shared", "kept"), [("A", Role.LORA_B), ("B", Role.LORA_A)])
def test_one_factor_is_shared_and_the_other_stays(shared: str, kept: str) -> None:
    battery = TestSharedB()
    strategy = FedSALoRA(shared=shared)  # type: ignore[arg-type]
    _, state = battery.begin()
    state = strategy.init(state.schema, state.adapter, 5)
    plan = strategy.plan(state, 0, "ada")
    updates = battery.updates(strategy, state)
    total = sum(update.weight for update in updates)

    after = run_round(strategy, state, updates)

    assert plan.personal == {kept}
    assert plan.train == state.schema.roles, "both are trained"
    for name, value in after.adapter.items():
        moved = [update.delta[name] for update in updates if name in update.delta]
        if name in state.schema.names(kept):
            assert not moved
            np.testing.assert_array_equal(value, state.adapter[name])
        else:
            mean = sum(u.weight / total * d.astype(np.float64) for u, d in zip(updates, moved, strict=True))
            np.testing.assert_allclose(value, state.adapter[name] + mean, atol=1e-6)
