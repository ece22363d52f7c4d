"""Every distinct broadcast of a round is encoded once, however a strategy hands its tensors over."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedloom.core.codecs.dense import Dense
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError, SchemaError, StrategyError
from fedloom.core.schema import Role, Schema, Tensors, TensorSpec
from fedloom.server.rounds.broadcast import Broadcasts
from fedloom.strategies.api import Plan, State
from fedloom.strategies.fedavg import FedAvg

SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (2, 50)), TensorSpec("m.B", "m", Role.LORA_B, (40, 2))))
CLIENTS = tuple(f"c{number}" for number in range(12))


class Varied(FedAvg):
    """FedAvg whose plans are changed for each client."""

    def __init__(self, change: Callable[[Plan, int], Plan]) -> None:
        super().__init__()
        object.__setattr__(self, "change", change)

    def plan(self, state: State, round: int, client: str) -> Plan:
        changed: Plan = self.change(super().plan(state, round, client), int(client[1:]))  # type: ignore[attr-defined]  # set above
        return changed


def copied(tensors: Tensors) -> dict[str, Any]:
    return {name: each.copy() for name, each in tensors.items()}


def shifted(tensors: Tensors, name: str, index: int, value: float) -> dict[str, Any]:
    found = copied(tensors)
    found[name].flat[index] = value
    return found


def encodes(configure: Any, monkeypatch: pytest.MonkeyPatch, change: Callable[[Plan, int], Plan]) -> tuple[int, int]:
    """How many broadcasts were encoded for twelve clients, and how many different ones they get."""
    config: RunConfig = configure(1)
    encode, count = Dense.encode, [0]

    def counted(self: Dense, schema: Schema, tensors: Tensors) -> bytes:
        count[0] += 1
        return encode(self, schema, tensors)

    monkeypatch.setattr(Dense, "encode", counted)
    strategy = Varied(change)
    state = strategy.init(SCHEMA, SCHEMA.zeros(), 0)
    broadcasts = Broadcasts(config, SCHEMA, strategy, state)
    assignments = [broadcasts.assignment(client) for client in CLIENTS]
    for client, assignment in zip(CLIENTS, assignments, strict=True):
        sent = strategy.plan(state, 0, client)
        start = broadcasts.start(client)
        for name, each in sent.broadcast.items():
            assert np.array_equal(start[name].view(np.uint32), each.view(np.uint32)), "a client gets its own tensors"
        assert dict(assignment.local) == dict(sent.local)
    return count[0], len({each.broadcast_digest for each in assignments})


def test_copies_are_encoded_once(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert encodes(configure, monkeypatch, lambda plan, k: replace(plan, broadcast=copied(plan.broadcast))) == (1, 1)


def test_other_instructions_with_the_same_tensors_encode_nothing_more(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = 0.01
    found = encodes(configure, monkeypatch, lambda plan, k: replace(plan, local={"learning_rate": rate * (k + 1)}))

    assert found == (1, 1)


@pytest.mark.parametrize("index", [0, 1, 99])
def test_tensors_that_differ_in_one_value_are_encoded_apart(
    configure: Any, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    def change(plan: Plan, k: int) -> Plan:
        return replace(plan, broadcast=shifted(plan.broadcast, "m.A", index, float(k % 3)))

    assert encodes(configure, monkeypatch, change) == (3, 3)


def test_a_zero_with_a_sign_is_another_value(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(plan: Plan, k: int) -> Plan:
        return replace(plan, broadcast=shifted(plan.broadcast, "m.B", 7, -0.0 if k % 2 else 0.0))

    assert encodes(configure, monkeypatch, change) == (2, 2)


def test_the_same_bytes_under_other_names_are_another_broadcast(configure: Any) -> None:
    schema = Schema((TensorSpec("m.A", "m", Role.LORA_A, (2, 40)), TensorSpec("m.B", "m", Role.LORA_B, (40, 2))))

    def change(plan: Plan, k: int) -> Plan:
        name = "m.B" if k % 2 else "m.A"
        return replace(plan, broadcast={name: plan.broadcast[name]})

    strategy = Varied(change)
    broadcasts = Broadcasts(configure(1), schema, strategy, strategy.init(schema, schema.zeros(), 0))

    even, odd = (broadcasts.assignment(client) for client in CLIENTS[:2])

    assert even.broadcast_digest == odd.broadcast_digest
    assert (set(even.broadcast_roles), set(odd.broadcast_roles)) == ({Role.LORA_A}, {Role.LORA_B})
    assert [set(broadcasts.start(client)) for client in CLIENTS[:2]] == [{"m.A"}, {"m.B"}]


def with_term(size: float) -> Callable[[Plan, int], Plan]:
    """Every second client gets a term for its gradients."""

    def change(plan: Plan, k: int) -> Plan:
        term = {"m.B": np.full((40, 2), size, np.float32)}
        return replace(plan, linear=term if k % 2 else {})

    return change


def test_a_term_for_gradients_makes_another_broadcast_and_is_no_part_of_the_start(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert encodes(configure, monkeypatch, with_term(0.5)) == (2, 2)


def test_a_strategy_is_shown_the_term_as_the_client_read_it_and_how_far_its_steps_went(configure: Any) -> None:
    schema = Schema((*SCHEMA.tensors, TensorSpec("head", "head", Role.HEAD, (3,))))
    train = {"steps": 5, "learning_rate": 0.1, "head_learning_rate": 0.4, "schedule": "linear"}
    config = configure(4, train=train, wire={"broadcast": "fp16"}, model={"head": "train"})
    strategy = Varied(with_term(0.1))
    state = replace(strategy.init(schema, schema.zeros(), 0), round=1)
    broadcasts = Broadcasts(config, schema, strategy, state)

    plain, told = (broadcasts.update(client, 2.0, {}, {"loss": 1.0}) for client in CLIENTS[:2])

    assert plain.linear == {}
    assert told.linear.keys() == {"m.B"}
    np.testing.assert_array_equal(told.linear["m.B"], np.full((40, 2), np.float32(np.float16(0.1))))
    assert plain.start.keys() == told.start.keys() == schema.names()
    # Round 1 of 4 is trained at three quarters of both rates.
    assert told.rate_sums == pytest.approx({"m.A": 0.375, "m.B": 0.375, "head": 1.5})
    assert (told.client, told.weight, told.metrics) == ("c1", 2.0, {"loss": 1.0})


@pytest.mark.parametrize(
    ("linear", "why"),
    [
        ({"m.B": np.full((40, 2), np.nan, np.float32)}, "'m.B', which has NaN or Inf"),
        ({"m.B": np.full((40, 2), -np.inf, np.float32)}, "'m.B', which has NaN or Inf"),
        ({"m.C": np.zeros((40, 2), np.float32)}, "'m.C', which is not among what it trains and uploads"),
    ],
)
def test_a_term_that_every_client_would_refuse_is_the_strategys_error(
    configure: Any, linear: Tensors, why: str
) -> None:
    strategy = Varied(lambda plan, k: replace(plan, linear=linear))
    broadcasts = Broadcasts(configure(1), SCHEMA, strategy, strategy.init(SCHEMA, SCHEMA.zeros(), 0))

    with pytest.raises(StrategyError, match=why):
        broadcasts.assignment("c0")


def test_a_term_of_another_shape_is_the_strategys_error(configure: Any) -> None:
    strategy = Varied(lambda plan, k: replace(plan, linear={"m.B": np.zeros((2, 40), np.float32)}))
    broadcasts = Broadcasts(configure(1), SCHEMA, strategy, strategy.init(SCHEMA, SCHEMA.zeros(), 0))

    with pytest.raises(SchemaError, match=r"'m.B.linear' has shape \(2, 40\); the schema says \(40, 2\)"):
        broadcasts.assignment("c0")


def test_plans_that_differ_in_turns_are_different_assignments(configure: Any) -> None:
    turns = (Role.LORA_A, Role.LORA_B)
    strategy = Varied(lambda plan, k: replace(plan, turns=turns[:: 1 if k % 2 else -1]))
    state = strategy.init(SCHEMA, SCHEMA.zeros(), 0)
    broadcasts = Broadcasts(configure(1, train={"steps": 2}), SCHEMA, strategy, state)

    found = [broadcasts.assignment(client) for client in CLIENTS]

    assert [each.turns for each in found] == [turns[:: 1 if k % 2 else -1] for k in range(len(CLIENTS))]
    assert len({each.broadcast_digest for each in found}) == 1


def test_turns_under_noise_of_bands_are_refused(configure: Any) -> None:
    strategy = Varied(lambda plan, k: replace(plan, turns=(Role.LORA_A, Role.LORA_B)))
    config = configure(1, train={"steps": 2}, privacy={"noise_bands": 2, "enabled": True, "noise_multiplier": 1.0})
    broadcasts = Broadcasts(config, SCHEMA, strategy, strategy.init(SCHEMA, SCHEMA.zeros(), 0))

    with pytest.raises(ConfigError, match=r"set privacy.noise_bands = 1, or choose another strategy"):
        broadcasts.assignment("c0")


def test_the_rate_sum_of_a_tensor_counts_the_steps_of_its_turns(configure: Any) -> None:
    strategy = Varied(lambda plan, k: replace(plan, turns=(Role.LORA_B, Role.LORA_A)))
    config = configure(1, train={"steps": 5, "learning_rate": 0.1})
    broadcasts = Broadcasts(config, SCHEMA, strategy, strategy.init(SCHEMA, SCHEMA.zeros(), 0))

    told = broadcasts.update("c0", 1.0, {}, {})

    assert told.rate_sums == pytest.approx({"m.B": 0.3, "m.A": 0.2})


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (
            (Role.LORA_A, Role.LORA_B),
            "2 selections of tensors take turns, and a round has 1 steps; set train",
        ),
        (("lora_Z",), "no client would take the strategy's plan: 'lora_Z' is to move by turns"),
        ((Role.HEAD,), "no client would take the strategy's plan: 'head' is to move by turns"),
    ],
)
def test_turns_that_no_round_could_follow_are_refused(configure: Any, turns: tuple[str, ...], message: str) -> None:
    strategy = Varied(lambda plan, k: replace(plan, turns=turns))
    broadcasts = Broadcasts(configure(1), SCHEMA, strategy, strategy.init(SCHEMA, SCHEMA.zeros(), 0))

    with pytest.raises(ConfigError, match=message):
        broadcasts.assignment("c0")
