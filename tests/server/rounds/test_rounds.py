from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.config.run import RoundsSection, RunConfig
from fedloom.core.errors import StoreError
from fedloom.server.rounds.scheduling import closing, decision, draw_cohort, opening, reopening
from fedloom.server.rounds.state import (
    AdapterCommitted,
    ClientLost,
    Event,
    LostReason,
    RoundClosed,
    RoundOpened,
    Rounds,
    RunCreated,
    SumAccepted,
    UpdateAccepted,
    apply,
    event_from_json,
    event_to_json,
)

CREATED = RunCreated("4f", "spec", "schema", "s0")
NAMES = ("ann", "ben", "cat", "dan", "eve")


def fold(events: Sequence[Event]) -> Rounds:
    rounds = Rounds()
    for event in events:
        rounds = apply(rounds, event)
    return rounds


def opened(*cohort: str, attempt: int = 0, number: int = 0, state: str = "s0") -> RoundOpened:
    return RoundOpened(number, attempt, state, cohort, 60.0)


def accepted(client: str, number: int = 0) -> UpdateAccepted:
    return UpdateAccepted(number, client, f"d-{client}", 1.0)


def config(rounds: int = 3, **section: float | None) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "trial", "rounds": rounds, "seed": 5},
            "model": {"base": "tiny", "labels": ["no", "yes"]},
            "train": {"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1},
            "rounds": section,
        }
    )


def test_a_round_from_opening_to_commit() -> None:
    rounds = fold([CREATED, opened("ann", "ben"), accepted("ben"), accepted("ann")])

    closed = closing(rounds, 2, 0.0)

    assert closed == RoundClosed(0, ("ann", "ben"), "complete")
    after = apply(apply(rounds, closed), AdapterCommitted(0, "s1"))
    assert after == Rounds(phase="idle", created=CREATED, round=1, state="s1")


def test_a_sum_closes_the_round_for_all_its_clients_at_once() -> None:
    rounds = fold([CREATED, opened("ann", "ben", "cat", "dan"), ClientLost(0, "ben", "left")])

    rounds = apply(rounds, SumAccepted(0, ("ann", "ben", "cat"), "d-sum"))

    assert rounds.sum == "d-sum"
    assert {update.digest for update in rounds.updates.values()} == {"d-sum"}
    assert not rounds.lost
    closed = closing(rounds, 3, 0.0)
    assert closed == RoundClosed(0, ("ann", "ben", "cat"), "complete"), "nobody waits for dan"
    assert not apply(apply(rounds, closed), AdapterCommitted(0, "s1")).sum


def test_a_round_opens_once_enough_clients_are_live() -> None:
    rounds, section = fold([CREATED]), RoundsSection(min_clients=2)

    assert opening(rounds, ["ann"], section, seed=0, needed=2) is None
    assert opening(rounds, ["ben", "ann"], section, seed=0, needed=3) is None
    assert opening(rounds, ["ben", "ann"], section, seed=0, needed=2) == RoundOpened(0, 0, "s0", ("ann", "ben"), 600.0)


def test_expecting_more_clients_holds_back_only_the_first_round() -> None:
    first = fold([CREATED])
    second = apply(
        fold([CREATED, opened("ann"), accepted("ann"), RoundClosed(0, ("ann",), "complete")]), AdapterCommitted(0, "s1")
    )

    assert decision(first, ["ann"], config(min_clients=1), 0.0, expect=2) is None
    assert isinstance(decision(second, ["ann"], config(min_clients=1), 0.0, expect=2), RoundOpened)


def test_nothing_opens_after_the_last_round() -> None:
    events: list[Event] = [
        CREATED,
        opened("ann"),
        accepted("ann"),
        RoundClosed(0, ("ann",), "complete"),
        AdapterCommitted(0, "s1"),
    ]

    assert decision(fold(events), NAMES, config(rounds=1, min_clients=1), 0.0) is None


def test_a_round_waits_for_everybody_until_the_deadline() -> None:
    rounds = fold([CREATED, opened(*NAMES), accepted("ann"), accepted("eve")])

    assert closing(rounds, 2, 59.9) is None
    assert closing(rounds, 3, 60.0) is None
    assert closing(rounds, 2, 60.0) == RoundClosed(0, ("ann", "eve"), "deadline")


@pytest.mark.parametrize("reason", ["left", "lease", "rejected"])
def test_a_round_does_not_wait_for_the_lost(reason: LostReason) -> None:
    rounds = fold(
        [CREATED, opened("ann", "ben", "cat"), accepted("ann"), accepted("cat"), ClientLost(0, "ben", reason)]
    )

    assert closing(rounds, 2, 0.0) == RoundClosed(0, ("ann", "cat"), "complete")


def test_a_lost_client_may_come_back_before_the_round_closes_unless_it_was_refused() -> None:
    rounds = fold([CREATED, opened("ann", "ben"), ClientLost(0, "ann", "lease"), ClientLost(0, "ben", "rejected")])

    back = apply(rounds, accepted("ann"))

    assert set(back.updates) == {"ann"}
    assert "ann" not in back.lost
    with pytest.raises(StoreError, match="cannot follow"):
        apply(rounds, accepted("ben"))


def test_a_short_round_is_opened_again_and_keeps_its_updates() -> None:
    section = RoundsSection(min_clients=2)
    rounds = fold([CREATED, opened("ann", "ben"), accepted("ann"), ClientLost(0, "ben", "lease")])

    assert reopening(rounds, ["ann"], section, seed=0, elapsed_s=1.0) is None
    again = reopening(rounds, ["ann", "dan"], section, seed=0, elapsed_s=1.0)
    assert again == RoundOpened(0, 1, "s0", ("ann", "dan"), 600.0)
    after = apply(rounds, again)
    assert after.pending == {"dan"}
    assert after.updates.keys() == {"ann"}
    assert not after.lost


def test_a_refused_client_is_not_asked_again_in_the_same_round() -> None:
    section = RoundsSection(min_clients=2)
    rounds = fold([CREATED, opened("ann", "ben"), ClientLost(0, "ben", "rejected")])

    assert reopening(rounds, ["ann", "ben"], section, seed=0, elapsed_s=1e9) is None
    again = reopening(rounds, ["ann", "ben", "cat"], section, seed=0, elapsed_s=0.0)
    assert again is not None
    assert again.cohort == ("ann", "cat")
    assert apply(rounds, again).rejected == {"ben"}


def test_a_round_that_misses_its_deadline_asks_others() -> None:
    section = RoundsSection(min_clients=2, clients_per_round=2)
    rounds = fold([CREATED, opened("ann", "ben"), accepted("ann")])

    assert reopening(rounds, NAMES, section, seed=0, elapsed_s=59.0) is None
    assert reopening(rounds, ["ann", "ben"], section, seed=0, elapsed_s=61.0) is None
    again = reopening(rounds, NAMES, section, seed=0, elapsed_s=61.0)
    assert again is not None
    assert len(again.cohort) == 2
    assert "ann" in again.cohort


@pytest.mark.parametrize(
    ("events", "event"),
    [
        ([], opened("ann")),
        ([CREATED], CREATED),
        ([CREATED], accepted("ann")),
        ([CREATED], opened("ann", number=1)),
        ([CREATED], opened("ann", state="other")),
        ([CREATED], opened("ann", attempt=1)),
        ([CREATED, opened("ann")], accepted("ben")),
        ([CREATED, opened("ann")], accepted("ann", number=1)),
        ([CREATED, opened("ann"), accepted("ann")], accepted("ann")),
        ([CREATED, opened("ann"), accepted("ann")], ClientLost(0, "ann", "lease")),
        ([CREATED, opened("ann"), accepted("ann")], opened("ben", attempt=1)),
        ([CREATED, opened("ann"), accepted("ann")], RoundClosed(0, (), "complete")),
        ([CREATED, opened("ann", "ben"), accepted("ann")], RoundClosed(0, ("ann", "ben"), "complete")),
        ([CREATED, opened("ann"), accepted("ann")], AdapterCommitted(0, "s1")),
        ([CREATED], SumAccepted(0, ("ann",), "d")),
        ([CREATED, opened("ann")], SumAccepted(0, (), "d")),
        ([CREATED, opened("ann")], SumAccepted(0, ("ann", "ben"), "d")),
        ([CREATED, opened("ann")], SumAccepted(1, ("ann",), "d")),
        ([CREATED, opened("ann", "ben"), accepted("ann")], SumAccepted(0, ("ben",), "d")),
    ],
)
def test_an_event_that_cannot_follow_is_refused(events: list[Event], event: Event) -> None:
    with pytest.raises(StoreError, match="cannot follow"):
        apply(fold(events), event)


@pytest.mark.parametrize("row", ["", "[]", "{}", '{"event":"os.system"}', '{"event":"AdapterCommitted","round":1}'])
def test_a_row_that_is_no_event_is_refused(row: str) -> None:
    with pytest.raises(StoreError, match="not an event"):
        event_from_json(row)


def test_a_row_with_an_unknown_field_is_refused() -> None:
    row = event_to_json(AdapterCommitted(1, "s")).replace("}", ',"extra":1}')

    with pytest.raises(StoreError, match="unknown fields"):
        event_from_json(row)


@given(st.sets(st.text(min_size=1), min_size=1), st.integers(1, 5), st.integers(0, 2**63 - 1), st.integers(0, 99))
def test_a_cohort_depends_on_the_set_of_clients_alone(clients: set[str], size: int, seed: int, number: int) -> None:
    cohort = draw_cohort(clients, size, seed=seed, round=number)

    assert cohort == draw_cohort(sorted(clients, reverse=True), size, seed=seed, round=number)
    assert len(cohort) == min(size, len(clients))
    assert set(cohort) <= clients
    assert list(cohort) == sorted(cohort)


def test_cohorts_differ_from_round_to_round_and_reach_everybody() -> None:
    cohorts = {draw_cohort(NAMES, 2, seed=1, round=number) for number in range(50)}

    assert len(cohorts) == 10  # every pair of five


MOVES = st.lists(
    st.tuples(st.sampled_from(["update", "left", "lease", "rejected", "wait"]), st.sampled_from(NAMES)), max_size=60
)


@given(MOVES, st.integers(1, 3), st.sampled_from([None, 3]))
def test_any_history_replays_to_the_same_state(
    moves: list[tuple[str, str]], min_clients: int, size: int | None
) -> None:
    run, log = config(rounds=4, min_clients=min_clients, clients_per_round=size, deadline_s=5.0), [CREATED]
    events: list[Event] = list(log)
    rounds, since_s, live = fold(events), 0.0, set(NAMES)

    def take(event: Event) -> None:
        nonlocal rounds
        events.append(event)
        rounds = apply(rounds, event)

    for move, client in moves:
        since_s += 1.0
        if move == "update" and client in rounds.pending:
            live.add(client)
            take(accepted(client, rounds.round))
        elif move in ("left", "lease", "rejected") and client in rounds.pending:
            live.discard(client)
            take(ClientLost(rounds.round, client, move))  # type: ignore[arg-type]  # narrowed by the line above
        while event := decision(rounds, live, run, since_s):
            take(event)
            since_s = 0.0
            if isinstance(event, RoundClosed):
                assert len(event.clients) >= min_clients
                take(AdapterCommitted(rounds.round, f"s{rounds.round + 1}"))

    replayed = fold([event_from_json(event_to_json(event)) for event in events])
    assert replayed == rounds
    assert rounds.round <= 4
    assert rounds.updates.keys() <= rounds.cohort
