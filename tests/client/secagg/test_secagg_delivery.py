"""One client's update on its way through a secure sum, past failures and new beginnings."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from fedloom.client.secagg.participant import Delivery
from fedloom.core.config.run import Spec
from fedloom.core.errors import FedloomError, ProtocolError, Unavailable
from fedloom.core.schema import Schema
from fedloom.core.secagg.keys import Place
from fedloom.core.secagg.steps import ALL, MASKED, Step
from fedloom.proto.messages import Answer, Joined, RoundStatus, StepMessage, StepResult, UpdateHeader

NAMES = ("ann", "ben", "cat", "dan", "eve", "fay")
UPDATE = np.arange(1000, dtype="<u4").tobytes()


@dataclass
class Line:
    """A coordinator that plays the other five clients, fails as told, and begins again as told."""

    cohort: Any
    failures: dict[Step, list[FedloomError | StepResult | None]] = field(default_factory=dict)
    sent: list[tuple[UpdateHeader, bytes]] = field(default_factory=list)
    messages: list[StepMessage] = field(default_factory=list)
    attempt: int = 5

    def join(self, client: str, declared_examples: int) -> Joined:
        raise AssertionError

    def work(self, held: str = "") -> Answer:
        raise AssertionError

    def fetch(self, digest: str, size_bytes: int) -> bytes:
        raise AssertionError

    def heartbeat(self) -> RoundStatus:
        raise AssertionError

    def leave(self, reason: str, score: tuple[float, ...] = ()) -> None:
        raise AssertionError

    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        self.sent.append((header, payload))
        self._fail(Step.MASK)
        return False

    def exchange(self, message: StepMessage) -> StepResult | None:
        self.messages.append(message)
        if message.step is not Step.MASK and self.failures.get(message.step):
            return self._fail(message.step)
        others = {name: attempt for name, attempt in self.cohort.attempts.items() if name != "ann"}
        match message.step:
            case Step.ADVERTISE:
                self.cohort = self.cohort.again()
                others = {name: attempt for name, attempt in self.cohort.attempts.items() if name != "ann"}
                adverts = {**self.cohort.adverts, "ann": message.parts[ALL]}
                self.sealed = {name: attempt.share(adverts) for name, attempt in others.items()}
                return StepResult(self.attempt, adverts)
            case Step.SHARE:
                self.sealed["ann"] = dict(message.parts)
                for name, attempt in others.items():
                    attempt.mask({peer: self.sealed[peer][name] for peer in NAMES if peer != name})
                return StepResult(self.attempt, {name: self.sealed[name]["ann"] for name in others})
            case Step.MASK:
                return StepResult(self.attempt, dict.fromkeys(NAMES, b""))
            case Step.CONFIRM:
                signed = {name: attempt.confirm(frozenset(NAMES)) for name, attempt in others.items()}
                return StepResult(self.attempt, {**signed, "ann": message.parts[ALL]})
            case Step.UNMASK:
                return StepResult(self.attempt, {})

    def _fail(self, step: Step) -> StepResult | None:
        outcome = self.failures.get(step) and self.failures[step].pop(0)
        if isinstance(outcome, FedloomError):
            raise outcome
        if isinstance(outcome, StepResult):
            self.attempt = outcome.attempt
        return outcome or None


HEADER = UpdateHeader("ann", 0, "ab" * 32, MASKED, len(UPDATE), "cd" * 32)


@pytest.fixture
def joined(spec: Spec) -> Callable[..., Joined]:
    def make(run: str = "run", epoch: int = 1) -> Joined:
        return Joined(run, epoch, spec, Schema((), 1.0))

    return make


def test_a_delivery_goes_through_the_steps_once(cohort: Any, joined: Callable[..., Joined]) -> None:
    line = Line(cohort)

    assert Delivery(cohort.member("ann"), HEADER, UPDATE).advance(line, joined())

    assert [message.step for message in line.messages] == list(Step)
    assert [message.attempt for message in line.messages] == [0, 5, 5, 5, 5]
    ((header, payload),) = line.sent
    assert header.attempt == 5
    assert len(payload) == len(UPDATE)
    assert payload != UPDATE


@pytest.mark.parametrize("step", list(Step))
def test_after_a_failure_of_the_line_the_same_bytes_are_sent_again(
    cohort: Any, joined: Callable[..., Joined], step: Step
) -> None:
    line = Line(cohort, {step: [Unavailable("cut")]})
    delivery = Delivery(cohort.member("ann"), HEADER, UPDATE)

    with pytest.raises(Unavailable):
        delivery.advance(line, joined())
    assert delivery.advance(line, joined())

    twice = [message for message in line.messages if message.step is step]
    if step is Step.MASK:
        assert len(line.sent) == 2
        assert line.sent[0] == line.sent[1]
    else:
        assert len(twice) == 2
        assert twice[0] == twice[1]


def test_others_that_are_late_are_waited_for(cohort: Any, joined: Callable[..., Joined]) -> None:
    line = Line(cohort, {Step.SHARE: [None]})
    delivery = Delivery(cohort.member("ann"), HEADER, UPDATE)

    assert not delivery.advance(line, joined())
    assert delivery.advance(line, joined())


@pytest.mark.parametrize("step", [Step.SHARE, Step.CONFIRM, Step.UNMASK])
def test_a_sum_that_begins_anew_is_masked_with_new_keys(cohort: Any, joined: Callable[..., Joined], step: Step) -> None:
    line = Line(cohort, {step: [StepResult(6, {})]})

    assert Delivery(cohort.member("ann"), HEADER, UPDATE).advance(line, joined())

    first, second = (message for message in line.messages if message.step is Step.ADVERTISE)
    assert first.parts != second.parts
    assert len({payload for _, payload in line.sent}) == len(line.sent)
    assert line.sent[-1][0].attempt == 6


def test_after_a_refusal_or_a_restart_new_keys_are_used(cohort: Any, joined: Callable[..., Joined]) -> None:
    line = Line(cohort, {Step.CONFIRM: [ProtocolError("too late"), Unavailable("restarting")]})
    delivery = Delivery(cohort.member("ann"), HEADER, UPDATE)

    with pytest.raises(ProtocolError):
        delivery.advance(line, joined())
    with pytest.raises(Unavailable):
        delivery.advance(line, joined())
    line.cohort.place = Place("run", 2, 0)
    assert delivery.advance(line, joined(epoch=2))

    keys = [message.parts for message in line.messages if message.step is Step.ADVERTISE]
    assert len(keys) == 3
    assert all(one != two for one, two in pairwise(keys))


def test_an_update_of_one_run_is_not_delivered_to_another(cohort: Any, joined: Callable[..., Joined]) -> None:
    line = Line(cohort, {Step.SHARE: [None]})
    delivery = Delivery(cohort.member("ann"), HEADER, UPDATE)
    delivery.advance(line, joined())

    with pytest.raises(ProtocolError, match="made for run"):
        delivery.advance(line, joined(run="other"))
