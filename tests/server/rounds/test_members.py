from collections.abc import Set
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.server.rounds import run_log as history
from fedloom.server.rounds import scheduling as decisions
from fedloom.server.rounds.membership import Members
from fedloom.server.storage.local import Store

NAMES = ("ann", "ben", "cat")
MOVES = st.lists(
    st.tuples(st.sampled_from(["join", "seen", "asks", "leaves"]), st.sampled_from(NAMES), st.sampled_from([0, 1, 7]))
)


@given(MOVES)
def test_the_live_are_those_who_asked_and_were_seen_within_their_lease(moves: list[tuple[str, str, int]]) -> None:
    members, now_s = Members(10.0, (), 0.0), 0.0
    seen_s: dict[str, float] = {}
    asked: set[str] = set()
    before: tuple[int, Set[str]] = members.changes, frozenset()

    for move, name, pause_s in moves:
        now_s += pause_s
        if name not in members:
            members.join(name, 1, now_s)
        members.seen(name, now_s)
        seen_s[name] = now_s
        if move == "asks":
            members.asks(name)
            asked.add(name)
        elif move == "leaves":
            members.leaves(name)
            asked.discard(name)

        live = members.live(now_s)
        assert live == {each for each in asked if now_s - seen_s[each] <= 10.0}
        if live != before[1]:
            assert members.changes > before[0]
        before = members.changes, frozenset(live)


def test_who_is_awaited_after_a_restart_is_live_for_one_lease() -> None:
    members = Members(10.0, ["ann", "ben"], 5.0)
    members.join("ben", 1, 12.0)

    assert members.live(15.0) == {"ann", "ben"}
    assert members.live(15.1) == {"ben"}


def test_joining_again_is_not_joining_first() -> None:
    members = Members(10.0, ["ann"], 0.0)

    assert members.join("ann", 3, 0.0)
    assert not members.join("ann", 4, 0.0)
    assert members["ann"].declared_examples == 4


def test_a_poll_decides_nothing_while_nothing_has_changed(
    federate: Any, configure: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two thousand clients that wait must not cost two thousand looks at the two thousand."""
    federation = federate(store, configure(rounds={"deadline_s": 5.0, "lease_s": 1e6}), expect=3)
    federation.begin("ann", "ben", "cat")
    federation.send(*federation.update("ann"))
    calls: list[float] = []
    decide = decisions.decision

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[3])
        return decide(*arguments)

    monkeypatch.setattr(history, "decision", counted)

    for _ in range(50):
        federation.work("ann")
        federation.coordinator.tick()
    assert calls == []
    federation.now_s = 5.0
    for _ in range(50):
        federation.work("ann")
    assert calls == [5.0], "once the deadline has passed, there is something to decide, once"
    federation.join("dan")
    federation.work("dan")
    federation.work("dan")
    assert len(calls) > 1, "another live client is something to decide about"
