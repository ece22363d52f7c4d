"""More clients are asked than updates are wanted, the round closes with those, and who is late is told the truth."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import ConfigError, ProtocolError, UpdateRejected
from fedloom.proto.messages import Assignment, Wait
from fedloom.server.rounds.scheduling import cohort_size
from fedloom.server.rounds.state import RoundClosed, RoundOpened
from fedloom.server.storage.local import Store

NAMES = tuple(f"c{number:02}" for number in range(20))


def chance(asked: int, wanted: int, dropout: Fraction) -> Fraction:
    """P(at least `wanted` of `asked` answer), exactly."""
    return sum(
        (math.comb(asked, k) * (1 - dropout) ** k * dropout ** (asked - k) for k in range(wanted, asked + 1)),
        Fraction(0),
    )


@given(
    st.integers(1, 60), st.integers(1, 90), st.sampled_from([Fraction(9, 10), Fraction(99, 100), Fraction(999, 1000)])
)
def test_the_cohort_is_the_smallest_that_is_large_enough(wanted: int, percent: int, probability: Fraction) -> None:
    dropout = Fraction(percent, 100)

    asked = cohort_size(wanted, float(dropout), float(probability))

    assert chance(asked, wanted, dropout) >= probability - Fraction(1, 10**9)
    assert asked == wanted or chance(asked - 1, wanted, dropout) < probability + Fraction(1, 10**9)


@pytest.mark.parametrize(
    ("rate", "sizes"), [(0.3, (15, 24, 42, 91, 170)), (0.1, (9, 16, 29, 65, 124)), (0.0, (5, 10, 20, 50, 100))]
)
def test_cohorts_for_999_rounds_in_1000(rate: float, sizes: tuple[int, ...]) -> None:
    assert tuple(cohort_size(wanted, rate, 0.999) for wanted in (5, 10, 20, 50, 100)) == sizes


def test_the_largest_cohorts_are_found_without_overflow() -> None:
    asked = cohort_size(10_000, 0.9, 0.999)

    # A negative binomial of so many is nearly normal, and 3.09 deviations hold 99.9 %.
    assert abs(asked - (10_000 / 0.1 + 3.09 * math.sqrt(10_000 * 0.9) / 0.1)) < 100


def selecting(configure: Any, length: int = 2, **section: object) -> Any:
    rounds = {"min_clients": 2, "clients_per_round": 5, "dropout_rate": 0.3, "lease_s": 10.0, **section}
    return configure(length, rounds=rounds)


def test_a_round_asks_more_than_it_wants_and_closes_with_what_it_wants(
    federate: Any, configure: Any, store: Store
) -> None:
    federation = federate(store, selecting(configure), expect=20)
    federation.begin(*NAMES)
    opened = store.events()[-1]
    assert isinstance(opened, RoundOpened)
    assert (len(opened.cohort), opened.wanted) == (15, 5)
    updates = {name: federation.update(name) for name in opened.cohort}

    for name in opened.cohort[5:10]:
        federation.send(*updates[name])

    closed = [event for event in store.events() if isinstance(event, RoundClosed)]
    assert closed == [RoundClosed(0, tuple(sorted(opened.cohort[5:10])), "complete")]
    late = opened.cohort[0]
    with pytest.raises(ProtocolError, match="is for round 1, which was closed without it; drop it and ask for work"):
        federation.send(*updates[late])
    assert federation.send(*updates[opened.cohort[5]]) is True, "a repeat of one that was counted is told so"
    assert isinstance(federation.work(late), Assignment | Wait), "it is released"
    again = store.events()[-1]
    assert isinstance(again, RoundOpened)
    assert (again.round, len(again.cohort)) == (1, 15)


def test_a_reopened_round_asks_for_what_is_missing_and_never_takes_more_than_it_wants(
    federate: Any, configure: Any, store: Store
) -> None:
    federation = federate(store, selecting(configure, min_clients=5, deadline_s=5.0), expect=20)
    federation.begin(*NAMES)
    first = store.events()[-1]
    assert isinstance(first, RoundOpened)
    for name in first.cohort[:3]:
        federation.send(*federation.update(name))
    federation.now_s = 6.0
    for name in NAMES:
        federation.work(name)

    again = store.events()[-1]

    assert isinstance(again, RoundOpened)
    assert again.attempt == 1
    assert len(again.cohort) == 3 + cohort_size(2, 0.3, 0.999)
    for name in [each for each in again.cohort if each not in first.cohort[:3]]:
        if federation.coordinator.progress.round == 0:
            federation.send(*federation.update(name))
    closed = [event for event in store.events() if isinstance(event, RoundClosed)]
    assert [len(event.clients) for event in closed] == [5]


def test_a_rate_without_a_number_wanted_is_refused(federate: Any, configure: Any, store: Store) -> None:
    with pytest.raises(ConfigError, match=r"needs rounds\.clients_per_round"):
        federate(store, selecting(configure, clients_per_round=None))


@pytest.mark.parametrize("section", [{"dropout_rate": 0.1, "clients_per_round": 5}, {"max_update_norm": 1.0}])
def test_secure_sums_are_not_bounded_or_over_selected(
    federate: Any, configure: Any, store: Store, section: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match="one by one"):
        federate(store, configure(secure_aggregation={"enabled": True}, rounds={"min_clients": 3, **section}))


@pytest.mark.parametrize("exponent", range(-30, 39, 4))
def test_an_update_beyond_the_declared_norm_is_refused_and_one_within_is_taken(
    federate: Any, configure: Any, store: Store, exponent: int
) -> None:
    """26 values of size x have norm x √26."""
    federation = federate(store, configure(1, rounds={"max_update_norm": 5.1}), expect=3)
    federation.begin("ann", "ben", "cat")
    size = float(f"1e{exponent}")
    update = federation.update("ann", size)

    if size * math.sqrt(26) <= 5.1 * (1 + 1e-6):
        assert federation.send(*update) is False
    else:
        with pytest.raises(UpdateRejected, match=r"L2 norm .*max_update_norm = 5\.1 is allowed"):
            federation.send(*update)
        assert federation.coordinator.progress.lost == {"ann": "rejected"}


def test_the_norm_is_that_of_all_tensors_together(federate: Any, configure: Any, store: Store) -> None:
    federation = federate(store, configure(1, rounds={"max_update_norm": 5.0}))
    federation.begin("ann", "ben")

    with pytest.raises(UpdateRejected, match=r"L2 norm 5\.099"):
        federation.send(*federation.update("ann", 1.0))
    assert federation.send(*federation.update("ben", float(np.float32(0.98)))) is False
