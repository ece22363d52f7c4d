"""What a state holds, what plans ask, and what a coordinator relies on when it replays a round or exports a model."""

import copy

import numpy as np
import pytest
from safetensors.numpy import load, save

from fedloom.strategies.conformance.battery import Battery
from fedloom.strategies.conformance.drive import (
    CLIENTS,
    ROUNDS,
    assert_close,
    assert_float32,
    assert_plan_fits,
    assert_same,
    broadcast_model,
    effective,
    run_round,
)
from fedloom.strategies.result import result_schema
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.state import state_from_bytes, state_to_bytes

__all__ = ["StateLaws"]


class StateLaws(Battery):
    """States, plans and results."""

    @pytest.mark.parametrize("moved", [0.0, 0.5])
    def test_state_starts_at_round_zero_with_an_adapter_of_the_schema(self, moved: float) -> None:
        """`init` fits the schema in float32 and leaves the model as it was given, a fresh or an earlier run's."""
        schema = self.schema()
        adapter = {name: each + np.float32(moved) for name, each in starting_adapter(schema, 5).items()}

        state = self.strategy().init(schema, adapter, 5)

        assert (state.round, state.seed, state.schema) == (0, 5, schema)
        assert_float32(schema, state.adapter)
        assert_close(effective(schema, state.adapter), effective(schema, adapter))

    def test_plans_fit_the_schema(self) -> None:
        """Every plan asks for roles the schema has and broadcasts tensors of the agreed shapes."""
        strategy, state = self.begin()
        for _ in range(ROUNDS):
            for client in CLIENTS:
                assert_plan_fits(state.schema, strategy.plan(state, state.round, client))
            state = run_round(strategy, state, self.updates(strategy, state))

    def test_arrival_order_is_forgotten_by_sorting(self) -> None:
        """Updates put in client order give the same bytes however they arrived."""
        strategy, state = self.begin()
        for _ in range(ROUNDS):
            updates = self.updates(strategy, state)
            arrivals = (updates, updates[::-1], updates[1:] + updates[:1])

            ends = [run_round(strategy, state, sorted(each, key=lambda u: u.client)) for each in arrivals]

            assert len({state_to_bytes(end) for end in ends}) == 1, "the strategy remembers how updates arrived"
            state = ends[0]

    def test_what_is_exported_is_what_was_evaluated(self) -> None:
        """The result fits its schema, is the model the next round starts from, and a run that begins from it has it."""
        strategy, state = self.begin()
        for _ in range(ROUNDS):
            state = run_round(strategy, state, self.updates(strategy, state))
            found = strategy.result(state)

            result_schema(state.schema, found)
            assert_close(broadcast_model(strategy, state), effective(state.schema, found))
            stored = load(save(dict(found)))
            again = self.strategy().result(state_from_bytes(state_to_bytes(state), state.schema))
            assert_same(again, found)
            assert_same(stored, found)
            adapter = {spec.name: stored[spec.name] for spec in state.schema.tensors}
            begun = self.strategy().init(state.schema, adapter, 5)
            assert_close(effective(state.schema, begun.adapter), effective(state.schema, adapter))

    def test_state_survives_storage(self) -> None:
        """A run resumed from stored bytes continues exactly as one that was never interrupted."""
        strategy, state = self.begin()
        for _ in range(ROUNDS):
            stored = state_to_bytes(state)
            restored = state_from_bytes(stored, state.schema)
            assert state_to_bytes(restored) == stored, "storing a restored state gives other bytes"

            resumed = self.strategy()
            continued = run_round(resumed, restored, self.updates(resumed, restored))
            state = run_round(strategy, state, self.updates(strategy, state))

            assert state_to_bytes(continued) == state_to_bytes(state), "what matters is not all in State"

    def test_runs_repeat_to_the_byte(self) -> None:
        """Two runs on the same updates end in the same bytes."""
        ends = []
        for _ in range(2):
            strategy, state = self.begin()
            for _ in range(ROUNDS):
                state = run_round(strategy, state, self.updates(strategy, state))
            ends.append(state_to_bytes(state))

        assert ends[0] == ends[1], "the same inputs gave other bytes; draw from Philox(key=[seed, round]) only"

    def test_commit_counts_the_round_and_keeps_the_schema(self) -> None:
        """A commit is one round, and the adapter stays what was agreed."""
        strategy, state = self.begin()
        for index in range(1, ROUNDS + 1):
            state = run_round(strategy, state, self.updates(strategy, state))

            assert (state.round, state.seed, state.schema) == (index, 5, self.schema())
            assert_float32(state.schema, state.adapter)

    def test_inputs_are_left_alone(self) -> None:
        """No function writes into what it was given."""
        strategy, state = self.begin()
        for _ in range(ROUNDS):
            updates = self.updates(strategy, state)
            before = copy.deepcopy((state_to_bytes(state), updates))

            end = run_round(strategy, state, updates)

            assert state_to_bytes(state) == before[0], "the state was written to"
            for update, kept in zip(updates, before[1], strict=True):
                assert_same(update.delta, kept.delta)
                assert_same(update.start, kept.start)
            state = end
