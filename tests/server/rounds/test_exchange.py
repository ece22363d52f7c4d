"""The coordinator's steps of a secure sum by messages alone: who is waited for, and what is refused."""

import numpy as np
import pytest

from fedloom.core.config.run import SecureAggregationSection
from fedloom.core.errors import ProtocolError
from fedloom.core.secagg.keys import ADVERT_BYTES, SEALED_BYTES, SIGNATURE_BYTES, Place
from fedloom.core.secagg.shamir import SHARE_BYTES
from fedloom.core.secagg.steps import ALL, Step
from fedloom.proto.messages import StepMessage, StepResult
from fedloom.server.secagg.protocol import Exchange

NAMES = ("ann", "ben", "cat", "dan", "eve", "fay")
VALUES = 5
PAYLOAD = np.arange(VALUES, dtype="<u4").tobytes()


@pytest.fixture
def exchange() -> Exchange:
    """Of six clients at least three, and four of six, are needed."""
    section = SecureAggregationSection(enabled=True, max_clients=6)
    return Exchange(Place("run", 1, 0), section, 3, VALUES)


def part(name: str, size: int) -> bytes:
    return name.encode().ljust(size, b".")


def message(exchange: Exchange, name: str, step: Step, names: tuple[str, ...] = NAMES) -> StepMessage:
    match step:
        case Step.ADVERTISE:
            return StepMessage(0, step, {ALL: part(name, ADVERT_BYTES)})
        case Step.SHARE:
            parts = {peer: part(name + peer, SEALED_BYTES) for peer in names if peer != name}
        case Step.MASK:
            parts = {}
        case Step.CONFIRM:
            parts = {ALL: part(name, SIGNATURE_BYTES)}
        case Step.UNMASK:
            parts = {peer: part(name + peer, SHARE_BYTES) for peer in names}
    return StepMessage(0, step, parts, exchange.attempt)


def send(exchange: Exchange, step: Step, *names: str, shared: tuple[str, ...] = NAMES) -> list[StepResult | None]:
    if step is Step.MASK:
        for name in names:
            exchange.add(name, exchange.attempt, PAYLOAD)
    return [exchange.take(name, message(exchange, name, step, shared)) for name in names]


def until(exchange: Exchange, step: Step) -> None:
    """Everybody takes part in all steps before `step`."""
    for each in Step:
        if each is step:
            return
        send(exchange, each, *NAMES)
        assert exchange.advance(NAMES, overdue=False)


def test_everybody_gets_what_the_others_sent(exchange: Exchange) -> None:
    results = {}
    for step in Step:
        assert exchange.step is step
        assert send(exchange, step, *NAMES) == [None] * 6
        assert exchange.advance(NAMES, overdue=False)
        results[step] = exchange.take("ben", message(exchange, "ben", step))

    assert results[Step.ADVERTISE] == StepResult(1, {name: part(name, ADVERT_BYTES) for name in NAMES})
    sealed = {name: part(f"{name}ben", SEALED_BYTES) for name in NAMES if name != "ben"}
    assert results[Step.SHARE] == StepResult(1, sealed)
    assert results[Step.MASK] == StepResult(1, dict.fromkeys(NAMES, b""))
    assert results[Step.CONFIRM] == StepResult(1, {name: part(name, SIGNATURE_BYTES) for name in NAMES})
    assert results[Step.UNMASK] == StepResult(1, {})
    given = exchange.unmasking()
    assert given is not None
    np.testing.assert_array_equal(given.total, 6 * np.arange(VALUES))
    assert (given.threshold, given.sharers, given.survivors) == (4, NAMES, NAMES)


@pytest.mark.parametrize("step", list(Step))
def test_a_step_waits_for_whoever_is_not_lost(exchange: Exchange, step: Step) -> None:
    until(exchange, step)
    send(exchange, step, *NAMES[:4])

    assert not exchange.advance(NAMES, overdue=False)
    assert not exchange.advance(NAMES[:5], overdue=False)
    assert exchange.step is step
    assert exchange.advance(NAMES[:4], overdue=False)
    assert exchange.members == frozenset(NAMES[:4])


@pytest.mark.parametrize("step", list(Step))
def test_a_step_whose_time_is_up_goes_on_with_enough(exchange: Exchange, step: Step) -> None:
    until(exchange, step)
    send(exchange, step, *NAMES[:4])

    assert exchange.advance(NAMES, overdue=True)
    assert exchange.step == (None if step is Step.UNMASK else step + 1)


@pytest.mark.parametrize("step", [Step.SHARE, Step.MASK, Step.CONFIRM])
def test_too_few_begin_anew_and_nothing_of_the_old_attempt_counts(exchange: Exchange, step: Step) -> None:
    until(exchange, step)
    old = [message(exchange, name, step) for name in NAMES]
    send(exchange, step, *NAMES[:3])

    assert not exchange.advance(NAMES[:4], overdue=False)
    assert exchange.advance(NAMES[:3], overdue=False)

    assert (exchange.attempt, exchange.step) == (2, Step.ADVERTISE)
    assert exchange.take("ann", old[0]) == StepResult(2, {})
    with pytest.raises(ProtocolError, match="attempt 1; the sum is at attempt 2"):
        exchange.add("ann", 1, PAYLOAD)
    until(exchange, Step.CONFIRM)


@pytest.mark.parametrize(("step", "overdue"), [(Step.ADVERTISE, True), (Step.UNMASK, True), (Step.UNMASK, False)])
def test_the_first_and_the_last_step_wait_however_long_it_takes(exchange: Exchange, step: Step, overdue: bool) -> None:
    """In the last, those who have given shares for one list would give none for another."""
    until(exchange, step)
    send(exchange, step, *NAMES[:2])

    assert not exchange.advance(NAMES[:2], overdue=overdue)
    assert exchange.step is step
    assert exchange.unmasking() is None


def test_too_few_shares_are_never_unmasked(exchange: Exchange) -> None:
    until(exchange, Step.UNMASK)
    for count in range(1, 4):
        send(exchange, Step.UNMASK, NAMES[count - 1])
        assert not exchange.advance(NAMES[:count], overdue=True)
    send(exchange, Step.UNMASK, NAMES[3])

    assert exchange.advance(NAMES[:4], overdue=False)
    assert exchange.unmasking() is not None


@pytest.mark.parametrize("step", [Step.SHARE, Step.CONFIRM, Step.UNMASK])
def test_the_same_message_again_is_the_same_and_another_is_refused(exchange: Exchange, step: Step) -> None:
    until(exchange, step)
    once = message(exchange, "ann", step)
    other = StepMessage(0, step, {name: bytes(len(value)) for name, value in once.parts.items()}, exchange.attempt)

    assert exchange.take("ann", once) is None
    assert exchange.take("ann", once) is None
    with pytest.raises(ProtocolError, match="something else"):
        exchange.take("ann", other)
    send(exchange, step, *NAMES)
    exchange.advance(NAMES, overdue=False)
    assert exchange.take("ann", once) is not None
    with pytest.raises(ProtocolError, match="something else"):
        exchange.take("ann", other)


def test_keys_may_be_replaced_until_the_others_see_them(exchange: Exchange) -> None:
    """A client that restarts before the step is closed has new ones."""
    fresh = StepMessage(0, Step.ADVERTISE, {ALL: bytes(ADVERT_BYTES)})
    send(exchange, Step.ADVERTISE, *NAMES)

    assert exchange.take("ann", fresh) is None
    exchange.advance(NAMES, overdue=False)

    shown = exchange.take("ann", fresh)
    assert shown is not None
    assert shown.parts["ann"] == bytes(ADVERT_BYTES)
    assert exchange.take("ann", message(exchange, "ann", Step.ADVERTISE)) is None


def test_a_masked_update_counts_once(exchange: Exchange) -> None:
    until(exchange, Step.MASK)

    assert not exchange.add("ann", 1, PAYLOAD)
    assert exchange.add("ann", 1, PAYLOAD)
    with pytest.raises(ProtocolError, match="something else"):
        exchange.add("ann", 1, bytes(len(PAYLOAD)))
    send(exchange, Step.MASK, *NAMES)
    exchange.advance(NAMES, overdue=False)
    assert exchange.add("ann", 1, PAYLOAD)
    send(exchange, Step.CONFIRM, *NAMES)
    exchange.advance(NAMES, overdue=False)
    send(exchange, Step.UNMASK, *NAMES)
    exchange.advance(NAMES, overdue=False)
    given = exchange.unmasking()
    assert given is not None
    np.testing.assert_array_equal(given.total, 6 * np.arange(VALUES))


def test_no_masked_update_is_kept(exchange: Exchange) -> None:
    """Only the running sum and a digest: no object of the payload's size is left but one."""
    until(exchange, Step.MASK)
    send(exchange, Step.MASK, *NAMES)

    arrays = [value for value in vars(exchange).values() if isinstance(value, np.ndarray)]
    assert [each.shape for each in arrays] == [(VALUES,)]
    assert {len(parts[ALL]) for parts in exchange._came.values()} == {32}


@pytest.mark.parametrize("size", [0, len(PAYLOAD) - 4, len(PAYLOAD) + 4])
def test_a_masked_update_of_another_length_is_refused(exchange: Exchange, size: int) -> None:
    until(exchange, Step.MASK)

    with pytest.raises(ProtocolError, match="5 are needed"):
        exchange.add("ann", 1, bytes(size))


def test_who_is_late_or_early_or_was_never_there_is_refused(exchange: Exchange) -> None:
    until(exchange, Step.SHARE)
    send(exchange, Step.SHARE, *NAMES[:5])
    exchange.advance(NAMES, overdue=True)

    for name in ("fay", "gus"):
        with pytest.raises(ProtocolError, match="too late or too early for step share"):
            exchange.take(name, message(exchange, name, Step.SHARE))
        with pytest.raises(ProtocolError, match="step mask"):
            exchange.add(name, 1, PAYLOAD)
    with pytest.raises(ProtocolError, match="step unmask"):
        exchange.take("ann", message(exchange, "ann", Step.UNMASK))
    with pytest.raises(ProtocolError, match="before its masked update"):
        exchange.take("ann", message(exchange, "ann", Step.MASK))


@pytest.mark.parametrize("step", [Step.ADVERTISE, Step.SHARE, Step.CONFIRM, Step.UNMASK])
@pytest.mark.parametrize("spoil", ["missing", "extra", "short", "long"])
def test_parts_that_do_not_fit_are_refused(exchange: Exchange, step: Step, spoil: str) -> None:
    until(exchange, step)
    good = message(exchange, "ann", step)
    parts = dict(good.parts)
    first = sorted(parts)[0]
    match spoil:
        case "missing":
            del parts[first]
        case "extra":
            parts["gus"] = parts[first]
        case "short":
            parts[first] = parts[first][:-1]
        case "long":
            parts[first] += b"."

    with pytest.raises(ProtocolError, match=f"parts in step {step.name.lower()}"):
        exchange.take("ann", StepMessage(0, step, parts, good.attempt))


def test_a_sum_takes_no_more_than_its_step_allows(exchange: Exchange) -> None:
    send(exchange, Step.ADVERTISE, *NAMES)

    with pytest.raises(ProtocolError, match="has 6 clients already"):
        exchange.take("gus", message(exchange, "gus", Step.ADVERTISE))
