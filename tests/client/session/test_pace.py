"""The times at which a private client's messages leave."""

import pytest

from fedloom.client.session.send_times import AT_ONCE, Pace
from tests.attacks.scripted import Clock


def test_work_of_different_length_ends_at_one_time() -> None:
    ends = []
    for preparing_s, training_s in ((0.1, 1.4), (4.9, 1.45)):
        clock = Clock(100.0)
        pace = Pace(clock, clock.sleep)
        with pace.preparing():
            clock.now += preparing_s
        ends.append(clock.now)
        with pace.training():
            clock.now += training_s
        ends.append(clock.now)

    assert ends == [105.0, 106.5] * 2


def test_a_wait_for_training_is_at_most_an_eighth_of_it() -> None:
    for tenths in range(11, 3000, 7):
        clock = Clock()
        with Pace(clock, clock.sleep).training():
            clock.now += tenths / 10
        assert tenths / 10 <= clock.now <= 1.125 * tenths / 10


def test_work_that_fails_ends_at_a_coarse_time_too() -> None:
    clock = Clock()

    def fail() -> None:
        with Pace(clock, clock.sleep).preparing():
            clock.now += 7.5
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert clock.now == 10.0


def test_a_coordinator_on_this_machine_is_not_kept_waiting() -> None:
    with AT_ONCE.preparing():
        pass
    clock = Clock()
    with Pace(clock, lambda _: pytest.fail("waited"), coarse=False).training():
        clock.now += 0.3
