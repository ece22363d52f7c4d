"""Rounds without a coordinator: what clients answer, what the model is, and what is compared."""

from collections.abc import Iterable, Mapping

import numpy as np

from fedloom.core.schema import LORA, Array, Schema, Tensors
from fedloom.strategies.api import Plan, State, Strategy, Update

__all__ = [
    "CLIENTS",
    "ROUNDS",
    "assert_asks_the_same",
    "assert_close",
    "assert_float32",
    "assert_plan_fits",
    "assert_same",
    "broadcast_model",
    "effective",
    "respond",
    "run_round",
    "trained_model",
]

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
    """The update of a client that follows `plan` and moves every uploaded tensor at random; odd ones have metrics.

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
    accuracy, loss = draw.random(2).tolist()
    metrics = {"held_out_rows": 40.0, "accuracy": accuracy, "loss": loss} if stream % 2 else {}
    rate_sums = dict.fromkeys(delta, 0.5)
    weight = float(1 + len(client) % 3)
    return Update(client, weight, plan.broadcast, delta, linear=plan.linear, rate_sums=rate_sums, metrics=metrics)


def run_round(strategy: Strategy, state: State, updates: Iterable[Update]) -> State:
    """Fold the updates as they come and commit."""
    acc = None
    for update in updates:
        acc = strategy.fold(state, acc, update)
    return strategy.commit(state, acc)


def trained_model(state: State, plan: Plan, update: Update) -> dict[str, Array]:
    """Effective weights on the client after training; what the plan does not broadcast is as in the adapter."""
    values = {**state.adapter, **plan.broadcast} | {name: update.value(name) for name in update.delta}
    return effective(state.schema, values)


def broadcast_model(strategy: Strategy, state: State) -> dict[str, Array]:
    """Effective weights of what the next round starts from."""
    plan = strategy.plan(state, state.round, CLIENTS[0])
    return effective(state.schema, {**state.adapter, **plan.broadcast})


def assert_asks_the_same(one: Plan, two: Plan) -> None:
    """Equal instructions over equal values."""
    told = [
        (p.train, p.personal, p.rank, dict(p.local), p.turns, sorted(p.broadcast), sorted(p.linear)) for p in (one, two)
    ]
    assert told[0] == told[1], "a linear strategy asks the same of every client"
    for name in one.broadcast:
        np.testing.assert_array_equal(one.broadcast[name], two.broadcast[name])
    for name in one.linear:
        np.testing.assert_array_equal(one.linear[name], two.linear[name])


def assert_plan_fits(schema: Schema, plan: Plan) -> None:
    """Every client could do what the plan asks."""
    assert plan.train, "the plan trains nothing"
    unknown = schema.unknown(plan.train | plan.personal)
    assert not unknown, f"the plan trains {unknown}, which the schema lacks"
    assert schema.select(plan.personal).names() <= schema.select(plan.train).names(), "personal must be trained"
    for word in plan.turns:
        taken = schema.select({word}).names()
        assert taken, f"{word} takes a turn, and the schema lacks it"
        assert taken <= schema.select(plan.train).names(), f"{word} takes a turn and must be trained"
    assert plan.local.keys() <= LOCAL, f"local hyper-parameters are {sorted(LOCAL)}"
    assert plan.rank is None or 1 <= plan.rank <= schema.rank, f"rank {plan.rank} is not within 1..{schema.rank}"
    uploaded = {spec.name for spec in schema.select(plan.train, but=plan.personal).tensors}
    assert uploaded <= plan.broadcast.keys(), "a tensor that is uploaded must be broadcast: its change starts there"
    at_rank = schema.with_rank(plan.rank) if plan.rank else schema
    assert_float32(at_rank.select(plan.linear), plan.linear)
    assert plan.linear.keys() <= uploaded, "a term is added to the gradient of what is trained and uploaded"
    corrections = [tensor.shape[0] for name, tensor in plan.broadcast.items() if name.endswith(".base_A")]
    full = at_rank.with_base(max(corrections)) if corrections else at_rank
    roles = {spec.role for spec in full.tensors if spec.name in plan.broadcast}
    assert_float32(full.select(roles), plan.broadcast)
    assert LORA & roles in (frozenset(), LORA), "broadcast both factors of a pair: a client that joins late has neither"


def assert_float32(schema: Schema, tensors: Tensors) -> None:
    """Exactly the schema's tensors, in finite float32."""
    schema.check(tensors)
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float32, f"{name} is {tensor.dtype}; adapters and broadcasts are float32"
        assert np.isfinite(tensor).all(), f"{name} holds NaN or Inf"


def assert_close(actual: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float = TOLERANCE) -> None:
    """The same tensors, equal but for rounding."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(actual[name], tensor, rtol=tolerance, atol=tolerance, err_msg=name)


def assert_same(actual: Tensors, expected: Tensors) -> None:
    """The same tensors, bit for bit."""
    assert actual.keys() == expected.keys(), "tensors were added or taken away"
    for name, tensor in expected.items():
        np.testing.assert_array_equal(actual[name], tensor, err_msg=f"{name} was changed")
