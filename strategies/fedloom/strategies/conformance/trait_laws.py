"""A strategy is what its traits say: combinations that are sound are decided by them alone."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from fedloom.core.errors import ProtocolError
from fedloom.strategies.api import corrections
from fedloom.strategies.conformance.battery import Battery
from fedloom.strategies.conformance.drive import (
    CLIENTS,
    ROUNDS,
    assert_asks_the_same,
    assert_close,
    broadcast_model,
    run_round,
)
from fedloom.strategies.state import state_to_bytes

__all__ = ["TraitLaws"]


class TraitLaws(Battery):
    """Every trait that is declared holds."""

    def test_fewer_updates_than_declared_are_refused(self) -> None:
        """`least_updates` are committed, and one fewer is not."""
        strategy, state = self.begin()
        least = strategy.traits.least_updates
        if least == 1:
            pytest.skip("any number of updates will do")
        updates = self.updates(strategy, state)[:least]

        assert run_round(strategy, state, updates).round == 1
        with pytest.raises(ProtocolError):
            run_round(strategy, state, updates[1:])

    def test_memory_does_not_grow_with_clients_unless_declared(self) -> None:
        """What `fold` holds on to is as large after many updates as after one, or `keeps_updates` says otherwise."""
        strategy, state = self.begin()
        kept = strategy.traits.keeps_updates
        assert not (kept and strategy.traits.linear), "a linear strategy needs no more than the sum"
        acc = None
        sizes: list[int] = []
        for client in self.clients(strategy) * 2:
            update = self.respond(state.schema, strategy.plan(state, state.round, client), client, len(sizes))
            acc = strategy.fold(state, acc, update)
            sizes.append(_held_bytes(acc))

        assert (sizes[-1] > sizes[0]) == kept, f"fold holds {sizes} bytes, and keeps_updates is {kept}"

    def test_state_does_not_remember_clients_unless_declared(self) -> None:
        """What `memory` holds beside corrections is no larger after many clients, or `remembers_clients` says so."""
        strategy, state = self.begin()
        few = self.clients(strategy)
        many = sorted((*few, *(f"{name}-too" for name in few)))
        sizes: list[int] = []
        for clients in (few, many):
            plans = [(name, strategy.plan(state, state.round, name)) for name in clients]
            updates = [self.respond(state.schema, plan, name, index) for index, (name, plan) in enumerate(plans)]
            after = run_round(strategy, state, updates)
            sizes.append(_held_bytes(after.memory) - _held_bytes(corrections(after)))

        remembers = strategy.traits.remembers_clients
        assert (sizes[1] > sizes[0]) == remembers, f"memory holds {sizes} bytes, and remembers_clients is {remembers}"

    def test_rates_do_not_count_unless_declared(self) -> None:
        """A strategy whose result `Update.rate_sums` change says `plain_sgd`, and no other does."""
        strategy, state = self.begin()
        updates = self.updates(strategy, state)
        others = [replace(update, rate_sums=dict.fromkeys(update.delta, 0.25)) for update in updates]

        ends = {state_to_bytes(run_round(strategy, state, each)) for each in (updates, others)}

        assert (len(ends) == 2) == strategy.traits.plain_sgd, "declare plain_sgd if rate_sums count, and only then"

    def test_a_linear_strategy_needs_only_the_mean(self) -> None:
        """What says that it is linear plans alike for all clients, and takes the mean update for all of them."""
        strategy, state = self.begin()
        if not strategy.traits.linear:
            pytest.skip("not declared linear")
        for _ in range(ROUNDS):
            plans = [strategy.plan(state, state.round, client) for client in CLIENTS]
            for plan in plans[1:]:
                assert_asks_the_same(plan, plans[0])
            updates = [replace(update, weight=1.0) for update in self.updates(strategy, state)]
            mean = {
                name: np.stack([update.delta[name] for update in updates]).mean(axis=0) for name in updates[0].delta
            }

            together = run_round(strategy, state, updates)
            alone = run_round(strategy, state, [replace(updates[0], delta=mean)])

            assert_close(broadcast_model(strategy, alone), broadcast_model(strategy, together))
            state = together

    def test_the_same_tensors_are_trained_in_every_round_if_declared(self) -> None:
        """A strategy that says `same_tensors` asks every client for the same ones in all rounds."""
        strategy, state = self.begin()
        if not strategy.traits.same_tensors:
            pytest.skip("not declared to train the same tensors in every round")
        asked = set()
        for _ in range(ROUNDS):
            plans = [strategy.plan(state, state.round, client) for client in self.clients(strategy)]
            asked |= {state.schema.select(plan.train, but=plan.personal).names() for plan in plans}
            state = run_round(strategy, state, self.updates(strategy, state))

        assert len(asked) == 1, "declare same_tensors = False if rounds or clients train different tensors"

    def test_coordinates_stay_unless_declared(self) -> None:
        """Without `rewrites` every tensor is where equal updates moved it, and what nobody trained is as it was."""
        strategy, state = self.begin()
        if strategy.traits.rewrites:
            pytest.skip("declared to rewrite coordinates")
        for index in range(ROUNDS):
            plans = [(name, strategy.plan(state, state.round, name)) for name in self.clients(strategy)]
            updates = [self.respond(state.schema, plan, name, index) for name, plan in plans]
            before, state = state.adapter, run_round(strategy, state, updates)
            for name, tensor in state.adapter.items():
                if name not in updates[0].delta:
                    np.testing.assert_array_equal(tensor, before[name], err_msg=f"nobody trained {name}")
                elif not strategy.traits.moments:
                    assert_close({name: tensor}, {name: updates[0].value(name)})

    def test_weights_do_not_count_if_declared(self) -> None:
        """A strategy that says `unweighted` gives the same bytes whatever the weights are."""
        strategy, state = self.begin()
        if not strategy.traits.unweighted:
            pytest.skip("not declared to ignore weights")
        updates = self.updates(strategy, state)
        others = [replace(update, weight=index + 0.5) for index, update in enumerate(updates)]

        ends = {state_to_bytes(run_round(strategy, state, each)) for each in (updates, others)}

        assert len(ends) == 1, "declare unweighted = False if a weight changes the result"


def _held_bytes(acc: object) -> int:
    """Bytes of all arrays reachable from an accumulator."""
    if isinstance(acc, np.ndarray):
        return acc.nbytes
    if isinstance(acc, Mapping):
        return sum(_held_bytes(each) for each in acc.values())
    if isinstance(acc, list | tuple | set | frozenset):
        return sum(_held_bytes(each) for each in acc)
    return sum(_held_bytes(each) for each in vars(acc).values()) if hasattr(acc, "__dict__") else 0
