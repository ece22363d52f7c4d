"""A battery that every strategy must pass, for pytest: subclass `StrategyConformance` and give it yours.

::

    from fedloom.strategies.conformance import StrategyConformance

    class TestMine(StrategyConformance):
        def strategy(self):
            return Mine()

Laws compare effective weights (scale * B @ A with its correction, biases, head): a strategy may rewrite factors. They
hold for every weighted mean; a server optimiser overrides the one it breaks with its own closed form.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from fedloom.core.errors import ProtocolError, SchemaError, UpdateRejected
from fedloom.core.schema import LORA, Array, Role, Schema, Tensors, TensorSpec
from fedloom.strategies.api import Plan, State, Strategy, Update
from fedloom.strategies.result import result
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.state import state_from_bytes, state_to_bytes

__all__ = ["StrategyConformance", "effective", "respond", "run_round"]

CLIENTS = ("ada", "bo", "cy")
ROUNDS = 3
"""Rounds each law is followed for: enough to see both halves of an alternating method."""
TOLERANCE = 1e-5
"""float32 keeps 6e-8 of values near 1, and a few additions and one product come on top."""
LOCAL = frozenset({"learning_rate", "momentum", "proximal_mu"})


def effective(schema: Schema, tensors: Tensors) -> dict[str, Array]:
    """What the model computes with, float64: scale * (B @ A + base_B @ base_A) by module, other tensors by name."""
    found = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    weights: dict[str, Array] = {}
    for pair in schema.pairs:
        product = found.pop(pair.b) @ found.pop(pair.a)
        if f"{pair.module}.base_A" in found:
            product += found.pop(f"{pair.module}.base_B") @ found.pop(f"{pair.module}.base_A")
        weights[pair.module] = schema.scale * product
    return weights | found


def respond(schema: Schema, plan: Plan, client: str, stream: int) -> Update:
    """The update of a client that follows `plan` and moves every uploaded tensor at random.

    Args:
        schema: Schema of the global adapter.
        plan: What the client was asked.
        client: Its name, which also sets its weight: 1, 2 or 3.
        stream: Index of the random stream; the same index gives the same changes.
    """
    at_rank = schema.with_rank(plan.rank) if plan.rank else schema
    uploaded = at_rank.select(plan.train, but=plan.personal)
    draw = np.random.Generator(np.random.Philox(key=[11, stream]))
    delta = {spec.name: draw.normal(0, 0.3, spec.shape).astype(np.float32) for spec in uploaded.tensors}
    return Update(client, float(1 + len(client) % 3), plan.broadcast, delta)


def run_round(strategy: Strategy, state: State, updates: Iterable[Update]) -> State:
    """Fold the updates as they come and commit."""
    acc = None
    for update in updates:
        acc = strategy.fold(state, acc, update)
    return strategy.commit(state, acc)


class StrategyConformance:
    """The battery. Define `strategy`; define `schema` only for a method that needs another adapter."""

    def strategy(self) -> Strategy:
        """A fresh instance of the strategy under test."""
        raise NotImplementedError("define strategy() in the subclass and return the strategy under test")

    def schema(self) -> Schema:
        """Two low-rank pairs of unequal shape and a head with a bias; rank 3, scale 2."""
        specs: list[TensorSpec] = []
        for module, out, inner in (("layer.0.query", 6, 5), ("layer.0.value", 4, 7)):
            specs.append(TensorSpec(f"{module}.lora_A", module, Role.LORA_A, (3, inner)))
            specs.append(TensorSpec(f"{module}.lora_B", module, Role.LORA_B, (out, 3)))
        specs.append(TensorSpec("classifier.weight", "classifier", Role.HEAD, (3, 4)))
        specs.append(TensorSpec("classifier.bias", "classifier", Role.HEAD, (3,)))
        return Schema(tuple(specs), scale=2.0)

    def respond(self, schema: Schema, plan: Plan, client: str, stream: int) -> Update:
        """What a client sends, see the function `respond`; override it for a method that is choosy about weights."""
        return respond(schema, plan, client, stream)

    @pytest.mark.parametrize("moved", [0.0, 0.5])
    def test_state_starts_at_round_zero_with_an_adapter_of_the_schema(self, moved: float) -> None:
        """`init` fits the schema in float32 and leaves the model as it was given, a fresh or an earlier run's."""
        schema = self.schema()
        adapter = {name: each + np.float32(moved) for name, each in starting_adapter(schema, 5).items()}

        state = self.strategy().init(schema, adapter, 5)

        assert (state.round, state.seed, state.schema) == (0, 5, schema)
        _assert_float32(schema, state.adapter)
        _assert_close(effective(schema, state.adapter), effective(schema, adapter))

    def test_plans_fit_the_schema(self) -> None:
        """Every plan asks for roles the schema has and broadcasts tensors of the agreed shapes."""
        strategy, state = self.begin()
        for _ in range(ROUNDS):
            for client in CLIENTS:
                _assert_plan_fits(state.schema, strategy.plan(state, state.round, client))
            state = run_round(strategy, state, self.updates(strategy, state))

    def test_one_client_becomes_the_model(self) -> None:
        """With a single client, the next broadcast is that client's model; where one is too few, see the next law."""
        strategy, state = self.begin()
        if getattr(strategy, "least_updates", 1) > 1:
            pytest.skip("declared to need more than one update")
        for index in range(ROUNDS):
            plan = strategy.plan(state, state.round, CLIENTS[0])
            update = self.respond(state.schema, plan, CLIENTS[0], index)
            expected = _trained_model(state, plan, update)

            state = run_round(strategy, state, [update])

            _assert_close(_broadcast_model(strategy, state), expected)

    def test_fewer_updates_than_declared_are_refused(self) -> None:
        """`least_updates` are committed, and one fewer is not."""
        strategy, state = self.begin()
        least = getattr(strategy, "least_updates", 1)
        if least == 1:
            pytest.skip("any number of updates will do")
        updates = self.updates(strategy, state)[:least]

        assert run_round(strategy, state, updates).round == 1
        with pytest.raises(ProtocolError):
            run_round(strategy, state, updates[1:])

    def test_memory_does_not_grow_with_clients_unless_declared(self) -> None:
        """What `fold` holds on to is as large after many updates as after one, or `keeps_updates` says otherwise."""
        strategy, state = self.begin()
        if getattr(strategy, "keeps_updates", False):
            assert not getattr(strategy, "linear", False), "a linear strategy needs no more than the sum"
            pytest.skip("declared to keep updates")
        acc = None
        sizes: list[int] = []
        for client in self.clients(strategy) * 2:
            update = self.respond(state.schema, strategy.plan(state, state.round, client), client, len(sizes))
            acc = strategy.fold(state, acc, update)
            sizes.append(_held_bytes(acc))

        assert sizes[-1] == sizes[0], "declare keeps_updates = True if every update must be seen at commit"

    def test_equal_updates_become_the_model(self) -> None:
        """Clients that moved alike count as one, whatever their weights."""
        strategy, state = self.begin()
        for index in range(ROUNDS):
            plan = strategy.plan(state, state.round, CLIENTS[0])
            plans = [(name, strategy.plan(state, state.round, name)) for name in self.clients(strategy)]
            updates = [self.respond(state.schema, each, name, index) for name, each in plans]
            expected = _trained_model(state, plan, updates[0])

            state = run_round(strategy, state, updates)

            _assert_close(_broadcast_model(strategy, state), expected)

    def test_a_linear_strategy_needs_only_the_mean(self) -> None:
        """What says that it is linear plans alike for all clients, and takes the mean update for all of them."""
        strategy, state = self.begin()
        if not getattr(strategy, "linear", False):
            pytest.skip("not declared linear")
        for _ in range(ROUNDS):
            plans = [strategy.plan(state, state.round, client) for client in CLIENTS]
            for plan in plans[1:]:
                _assert_asks_the_same(plan, plans[0])
            updates = [replace(update, weight=1.0) for update in self.updates(strategy, state)]
            mean = {
                name: np.stack([update.delta[name] for update in updates]).mean(axis=0) for name in updates[0].delta
            }

            together = run_round(strategy, state, updates)
            alone = run_round(strategy, state, [replace(updates[0], delta=mean)])

            _assert_close(_broadcast_model(strategy, alone), _broadcast_model(strategy, together))
            state = together

    def test_arrival_order_is_forgotten_by_sorting(self) -> None:
        """Updates put in client order give the same bytes however they arrived."""
        strategy, state = self.begin()
        for _ in range(ROUNDS):
            updates = self.updates(strategy, state)
            arrivals = (updates, updates[::-1], updates[1:] + updates[:1])

            ends = [run_round(strategy, state, sorted(each, key=lambda u: u.client)) for each in arrivals]

            assert len({state_to_bytes(end) for end in ends}) == 1, "the strategy remembers how updates arrived"
            state = ends[0]

    def test_order_matters_only_by_rounding(self) -> None:
        """Updates folded in another order give the same model but for the last digits."""
        strategy, state = self.begin()
        for _ in range(ROUNDS):
            updates = self.updates(strategy, state)

            forward, backward = (run_round(strategy, state, each) for each in (updates, updates[::-1]))

            _assert_close(_broadcast_model(strategy, forward), _broadcast_model(strategy, backward), 1e-6)
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
            _assert_close(_broadcast_model(strategy, plain), _broadcast_model(strategy, other), 1e-6)
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

    def test_the_result_is_what_clients_are_given(self) -> None:
        """What is scored and exported is the model that the next round starts from."""
        strategy, state = self.begin()
        for _ in range(ROUNDS):
            state = run_round(strategy, state, self.updates(strategy, state))
            _assert_close(_broadcast_model(strategy, state), effective(state.schema, result(strategy, state)))

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
            _assert_float32(state.schema, state.adapter)

    def test_inputs_are_left_alone(self) -> None:
        """No function writes into what it was given."""
        strategy, state = self.begin()
        for _ in range(ROUNDS):
            updates = self.updates(strategy, state)
            before = copy.deepcopy((state_to_bytes(state), updates))

            end = run_round(strategy, state, updates)

            assert state_to_bytes(state) == before[0], "the state was written to"
            for update, kept in zip(updates, before[1], strict=True):
                _assert_same(update.delta, kept.delta)
                _assert_same(update.start, kept.start)
            state = end

    def begin(self) -> tuple[Strategy, State]:
        """A strategy and a state whose every tensor is away from zero, so that no law holds trivially."""
        strategy, schema = self.strategy(), self.schema()
        draw = np.random.Generator(np.random.Philox(key=[5, 99]))
        drawn = starting_adapter(schema, 5)
        adapter = {n: each + draw.normal(0, 0.3, each.shape).astype(np.float32) for n, each in drawn.items()}
        return strategy, strategy.init(schema, adapter, 5)

    def updates(self, strategy: Strategy, state: State) -> list[Update]:
        """One update of every client, in client order, different in every round."""
        clients = self.clients(strategy)
        plans = [strategy.plan(state, state.round, client) for client in clients]
        return [
            self.respond(state.schema, plan, client, 10 * state.round + index)
            for index, (client, plan) in enumerate(zip(clients, plans, strict=True))
        ]

    def clients(self, strategy: Strategy) -> tuple[str, ...]:
        """Names in canonical order: three, or as many as the strategy needs."""
        more = range(getattr(strategy, "least_updates", 1) - len(CLIENTS))
        return CLIENTS + tuple(f"dee-{index:03d}" for index in more)


def _held_bytes(acc: object) -> int:
    """Bytes of all arrays reachable from an accumulator."""
    if isinstance(acc, np.ndarray):
        return acc.nbytes
    if isinstance(acc, Mapping):
        return sum(_held_bytes(each) for each in acc.values())
    if isinstance(acc, list | tuple | set | frozenset):
        return sum(_held_bytes(each) for each in acc)
    return sum(_held_bytes(each) for each in vars(acc).values()) if hasattr(acc, "__dict__") else 0


def _trained_model(state: State, plan: Plan, update: Update) -> dict[str, Array]:
    """Effective weights on the client after training; what the plan does not broadcast is as in the adapter."""
    values = {**state.adapter, **plan.broadcast} | {name: update.value(name) for name in update.delta}
    return effective(state.schema, values)


def _broadcast_model(strategy: Strategy, state: State) -> dict[str, Array]:
    plan = strategy.plan(state, state.round, CLIENTS[0])
    return effective(state.schema, {**state.adapter, **plan.broadcast})


def _assert_asks_the_same(one: Plan, two: Plan) -> None:
    """Equal instructions over equal values."""
    told = [(plan.train, plan.personal, plan.rank, dict(plan.local), sorted(plan.broadcast)) for plan in (one, two)]
    assert told[0] == told[1], "a linear strategy asks the same of every client"
    for name in one.broadcast:
        np.testing.assert_array_equal(one.broadcast[name], two.broadcast[name])


def _assert_plan_fits(schema: Schema, plan: Plan) -> None:
    assert plan.train, "the plan trains nothing"
    unknown = schema.unknown(plan.train | plan.personal)
    assert not unknown, f"the plan trains {unknown}, which the schema lacks"
    assert schema.select(plan.personal).names() <= schema.select(plan.train).names(), "personal must be trained"
    assert plan.local.keys() <= LOCAL, f"local hyper-parameters are {sorted(LOCAL)}"
    assert plan.rank is None or 1 <= plan.rank <= schema.rank, f"rank {plan.rank} is not within 1..{schema.rank}"
    uploaded = {spec.name for spec in schema.select(plan.train, but=plan.personal).tensors}
    assert uploaded <= plan.broadcast.keys(), "a tensor that is uploaded must be broadcast: its change starts there"
    at_rank = schema.with_rank(plan.rank) if plan.rank else schema
    corrections = [tensor.shape[0] for name, tensor in plan.broadcast.items() if name.endswith(".base_A")]
    full = at_rank.with_base(max(corrections)) if corrections else at_rank
    roles = {spec.role for spec in full.tensors if spec.name in plan.broadcast}
    _assert_float32(full.select(roles), plan.broadcast)
    assert LORA & roles in (frozenset(), LORA), "broadcast both factors of a pair: a client that joins late has neither"


def _assert_float32(schema: Schema, tensors: Tensors) -> None:
    schema.check(tensors)
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float32, f"{name} is {tensor.dtype}; adapters and broadcasts are float32"
        assert np.isfinite(tensor).all(), f"{name} holds NaN or Inf"


def _assert_close(actual: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float = TOLERANCE) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(actual[name], tensor, rtol=tolerance, atol=tolerance, err_msg=name)


def _assert_same(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys(), "tensors were added to or taken from an update"
    for name, tensor in expected.items():
        np.testing.assert_array_equal(actual[name], tensor, err_msg=f"{name} of an update was written to")
