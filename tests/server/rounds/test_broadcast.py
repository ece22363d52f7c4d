"""Every distinct broadcast of a round is encoded once, however a strategy hands its tensors over."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedloom.core.codecs.dense import Dense
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError
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


def test_plans_that_differ_in_turns_are_different_assignments(configure: Any) -> None:
    turns = (Role.LORA_A, Role.LORA_B)
    strategy = Varied(lambda plan, k: replace(plan, turns=turns[:: 1 if k % 2 else -1]))
    state = strategy.init(SCHEMA, SCHEMA.zeros(), 0)
    broadcasts = Broadcasts(configure(1, train={"steps": 2}), SCHEMA, strategy, state)

    found = [broadcasts.assignment(client) for client in CLIENTS]

    assert [each.turns for each in found] == [turns[:: 1 if k % 2 else -1] for k in range(len(CLIENTS))]
    assert len({each.broadcast_digest for each in found}) == 1


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
