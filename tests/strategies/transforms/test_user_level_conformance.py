"""The battery on wrapped strategies. Laws of a weighted mean become those of a sum over a fixed denominator."""

from dataclasses import replace

import numpy as np
import pytest

from fedloom.core.errors import UpdateRejected
from fedloom.core.schema import Schema
from fedloom.strategies.api import Plan, Strategy, Update
from fedloom.strategies.conformance import StrategyConformance, effective, respond, run_round
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedpeft import FedPEFT
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.ffa import FFA
from fedloom.strategies.transforms.user_level_dp import UserLevel

MAKE = {
    "fedavg": lambda: UserLevel(FedAvg(), bytes(32), 3, 0.5, 1e-11),
    "fedavg, tree": lambda: UserLevel(FedAvg(), bytes(32), 3, 0.5, 1e-11, "tree"),
    "fedavg, frozen head": lambda: UserLevel(FedAvg(train_head=False), bytes(32), 3, 0.5, 1e-11),
    "ffa, tree": lambda: UserLevel(FFA(), bytes(32), 3, 0.5, 1e-11, "tree"),
    "fedsvd, adaptive": lambda: UserLevel(FedSVD(), bytes(32), 3, 0.5, 1e-11, target_quantile=0.5),
    "fedpeft": lambda: UserLevel(FedPEFT(), bytes(32), 3, 0.5, 1e-11),
}


class TestUserLevel(StrategyConformance):
    @pytest.fixture(autouse=True, params=MAKE)
    def _name(self, request: pytest.FixtureRequest) -> None:
        self.name: str = request.param

    def strategy(self) -> Strategy:
        return MAKE[self.name]()

    def respond(self, schema: Schema, plan: Plan, client: str, stream: int) -> Update:
        """Within the clip norm of 0.5, of which a step of the grid is 5e-7."""
        update = respond(schema, plan, client, stream)
        return replace(update, weight=1.0, delta={name: np.float32(0.05) * each for name, each in update.delta.items()})

    def test_one_client_becomes_the_model(self) -> None:
        """One client of a cohort of three moves the model by a third of its change."""
        strategy, state = self.begin()
        for index in range(3):
            update = self.respond(state.schema, strategy.plan(state, state.round, "ada"), "ada", index)
            third = {name: tensor / 3 for name, tensor in update.delta.items()}
            values = {**state.adapter} | {name: update.start[name] + each for name, each in third.items()}

            state = run_round(strategy, state, [update])

            expected, actual = effective(state.schema, values), effective(state.schema, state.adapter)
            for name, tensor in expected.items():
                np.testing.assert_allclose(actual[name], tensor, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("factor", [0.125, 3.0, 1000.0])
    def test_only_relative_weights_matter(self, factor: float) -> None:
        """A weight other than 1 would move the sum by more than the clip norm, and is refused."""
        strategy, state = self.begin()
        update = self.updates(strategy, state)[0]

        with pytest.raises(UpdateRejected):
            run_round(strategy, state, [replace(update, weight=factor)])
