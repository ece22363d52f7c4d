"""Participation is what the log says happened, not what the run file planned."""

from fedloom.server.monitoring.participation import rounds_asked
from fedloom.server.rounds.state import (
    AdapterCommitted,
    ClientLost,
    Event,
    RoundClosed,
    RoundOpened,
    RunCreated,
    UpdateAccepted,
)

BEGUN = RunCreated("r", "spec", "schema", "s0")


def opened(round: int, *cohort: str, attempt: int = 0) -> RoundOpened:
    return RoundOpened(round, attempt, "s", cohort, 60.0)


def accepted(round: int, client: str) -> UpdateAccepted:
    return UpdateAccepted(round, client, "d", 1.0)


def test_rounds_a_client_sits_out_are_not_counted() -> None:
    log: list[Event] = [
        BEGUN,
        opened(0, "a", "b"),
        accepted(0, "a"),
        accepted(0, "b"),
        RoundClosed(0, ("a", "b"), "complete"),
        AdapterCommitted(0, "s1"),
        opened(1, "b", "c"),
    ]

    assert rounds_asked(log) == {"a": 1, "b": 2, "c": 1}


def test_a_client_asked_again_may_have_trained_twice() -> None:
    log: list[Event] = [
        BEGUN,
        opened(0, "a", "b"),
        accepted(0, "a"),
        ClientLost(0, "b", "lease"),
        opened(0, "a", "b", attempt=1),
    ]

    assert rounds_asked(log) == {"a": 1, "b": 2}, "a's update was accepted, so it was not asked again"


def test_an_empty_log_asked_nobody() -> None:
    assert rounds_asked([BEGUN]) == {}
