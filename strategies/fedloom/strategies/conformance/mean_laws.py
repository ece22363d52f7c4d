"""Laws of every weighted mean, and of what no mean may take in.

They compare effective weights (scale * B @ A with its correction, biases, head), since a strategy may rewrite factors.
"""

from dataclasses import replace

import numpy as np
import pytest

from fedloom.core.errors import SchemaError, UpdateRejected
from fedloom.strategies.api import Strategy
from fedloom.strategies.conformance.battery import Battery
from fedloom.strategies.conformance.drive import (
    CLIENTS,
    ROUNDS,
    assert_close,
    broadcast_model,
    run_round,
    trained_model,
)

__all__ = ["MeanLaws"]


class MeanLaws(Battery):
    """What becomes of updates."""

    def test_one_client_becomes_the_model(self) -> None:
        """With a single client, the next broadcast is that client's model; where one is too few, see the next law."""
        strategy, state = self.begin()
        if strategy.traits.least_updates > 1:
            pytest.skip("declared to need more than one update")
        _skip_unless_mean(strategy)
        for index in range(ROUNDS):
            plan = strategy.plan(state, state.round, CLIENTS[0])
            update = self.respond(state.schema, plan, CLIENTS[0], index)
            expected = trained_model(state, plan, update)

            state = run_round(strategy, state, [update])

            assert_close(broadcast_model(strategy, state), expected)

    def test_equal_updates_become_the_model(self) -> None:
        """Clients that moved alike count as one, whatever their weights."""
        strategy, state = self.begin()
        _skip_unless_mean(strategy)
        for index in range(ROUNDS):
            plan = strategy.plan(state, state.round, CLIENTS[0])
            plans = [(name, strategy.plan(state, state.round, name)) for name in self.clients(strategy)]
            updates = [self.respond(state.schema, each, name, index) for name, each in plans]
            expected = trained_model(state, plan, updates[0])

            state = run_round(strategy, state, updates)

            assert_close(broadcast_model(strategy, state), expected)

    def test_order_matters_only_by_rounding(self) -> None:
        """Updates folded in another order give the same model but for the last digits."""
        strategy, state = self.begin()
        for _ in range(ROUNDS):
            updates = self.updates(strategy, state)

            forward, backward = (run_round(strategy, state, each) for each in (updates, updates[::-1]))

            assert_close(broadcast_model(strategy, forward), broadcast_model(strategy, backward), 1e-6)
            state = forward

    @pytest.mark.parametrize("factor", [0.125, 3.0, 1000.0])
    def test_only_relative_weights_matter(self, factor: float) -> None:
        """Weights times a constant change nothing."""
        strategy, state = self.begin()
        for _ in range(ROUNDS):
            updates = self.updates(strategy, state)
            scaled = [replace(each, weight=each.weight * factor) for each in updates]

            plain = run_round(strategy, state, updates)

            other = run_round(strategy, state, scaled)
            assert_close(broadcast_model(strategy, plain), broadcast_model(strategy, other), 1e-6)
            state = plain

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_numbers_that_are_none_are_refused(self, value: float) -> None:
        """One NaN or Inf in any tensor is refused before it reaches the adapter."""
        strategy, state = self.begin()
        update = self.updates(strategy, state)[0]
        for name, tensor in update.delta.items():
            spoiled = tensor.copy()
            spoiled.flat[-1] = value
            with pytest.raises(UpdateRejected):
                run_round(strategy, state, [replace(update, delta={**update.delta, name: spoiled})])

    @pytest.mark.parametrize("weight", [0.0, -1.0, np.nan, np.inf])
    def test_bad_weights_are_refused(self, weight: float) -> None:
        """A weight that is not positive and finite is refused."""
        strategy, state = self.begin()
        first, *rest = self.updates(strategy, state)

        with pytest.raises(UpdateRejected):
            run_round(strategy, state, [replace(first, weight=weight), *rest])

    def test_tensors_that_do_not_fit_are_refused(self) -> None:
        """A missing, extra or misshapen tensor is refused."""
        strategy, state = self.begin()
        update = self.updates(strategy, state)[0]
        name, tensor = next(iter(update.delta.items()))
        others = {key: each for key, each in update.delta.items() if key != name}
        misshapen = np.zeros((*tensor.shape[:-1], tensor.shape[-1] + 1), np.float32)
        flat = np.zeros(1, np.float32)  # would broadcast silently
        for delta in (others, {**others, name: misshapen}, {**others, name: flat}, {**update.delta, "stranger": flat}):
            with pytest.raises(SchemaError):
                run_round(strategy, state, [replace(update, delta=delta)])


def _skip_unless_mean(strategy: Strategy) -> None:
    if strategy.traits.moments:
        pytest.skip("declared to take a server optimizer's step")
    if strategy.traits.lossy:
        pytest.skip("declared to leave out part of an update")
