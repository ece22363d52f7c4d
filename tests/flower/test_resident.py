"""What a site's resident trainer answers, keeps and refuses: everything that a client does for one assignment."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from fedloom.client.session import outbox as outbox
from fedloom.core.errors import BudgetError
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.flower.messages import Request
from fedloom.proto.messages import Joined
from tests.flower.conftest import BROADCAST, Site

Work = Callable[[int], Request]


def test_a_request_without_work_prepares_and_declares(site: Site, joined: Joined) -> None:
    resident = site.start()

    reply, payload = resident.answer(Request(joined), b"")
    again, _ = resident.answer(Request(joined), b"")

    assert (reply.client, reply.declared_examples, reply.header, reply.refusal, payload) == (
        "site-a",
        40,
        None,
        "",
        b"",
    )
    assert again == reply
    assert len(site.trainers) == 1, "the model is loaded once"
    resident.close()


def test_an_update_has_the_length_and_digest_that_its_header_says(site: Site, work: Work) -> None:
    resident = site.start()

    reply, payload = resident.answer(work(0), BROADCAST)

    assert reply.header is not None
    assert (reply.header.client, reply.header.round) == ("site-a", 0)
    assert (reply.header.payload_bytes, reply.header.digest) == (len(payload), hashlib.sha256(payload).hexdigest())
    resident.close()


def test_a_run_that_the_policy_refuses_is_refused_before_anything_is_prepared(site: Site, work: Work) -> None:
    strict = site.policy.privacy.model_copy(update={"min_noise_multiplier": 3.0})
    site.policy = site.policy.model_copy(update={"privacy": strict})

    reply, payload = site.start().answer(work(0), BROADCAST)

    assert (reply.refusal, reply.header, payload) == ("refused", None, b"")
    assert not site.trainers
    assert "noise" not in str(reply), "why is not the coordinator's business"


def test_a_retried_message_gets_the_same_bytes(site: Site, work: Work) -> None:
    resident = site.start()

    first, second = (resident.answer(work(0), BROADCAST) for _ in range(2))

    assert first == second
    assert site.trainers[0].calls.count("train 0") == 1
    resident.close()
    assert site.charges == 1


def test_a_trainer_that_was_killed_answers_with_the_same_bytes(site: Site, work: Work) -> None:
    resident = site.start()
    first = resident.answer(work(0), BROADCAST)
    resident.close()  # all that a killed process leaves: ledger and outbox on the disk

    anew = site.start()

    assert anew.answer(work(0), BROADCAST) == first
    anew.close()
    assert site.charges == 1


def test_the_next_round_is_trained_and_takes_the_place_of_the_last(site: Site, work: Work) -> None:
    resident = site.start()
    first = resident.answer(work(0), BROADCAST)

    second = resident.answer(work(1), BROADCAST)

    assert first[1] != second[1]
    assert second == resident.answer(work(1), BROADCAST)
    assert len(site.waiting) == 1
    resident.close()
    assert site.charges == 2


def test_a_round_that_was_answered_is_not_answered_again_after_the_next(site: Site, work: Work) -> None:
    resident = site.start()
    resident.answer(work(0), BROADCAST)
    newest = resident.answer(work(1), BROADCAST)

    reply, payload = resident.answer(work(0), BROADCAST)

    assert (reply.refusal, payload) == ("refused", b"")
    assert resident.answer(work(1), BROADCAST) == newest, "what was refused has cost nothing"
    resident.close()
    assert site.charges == 2


def test_the_bytes_are_spooled_before_the_ledger_says_that_they_leave(
    site: Site, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = site.start()
    resident.answer(Request(work(0).joined), b"")
    calls = site.trainers[0].calls
    keep = outbox.keep

    def noted(*arguments: object) -> None:
        calls.append("outbox")
        keep(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("fedloom.client.session.participant.keep", noted)
    resident.answer(work(0), BROADCAST)

    assert calls == ["train 0", "outbox", "release"]
    resident.close()


@pytest.mark.parametrize("payload", [b"", BROADCAST[:-1], BROADCAST[:-1] + b"\x01"])
def test_a_broadcast_that_is_not_the_one_named_is_not_trained_on(site: Site, work: Work, payload: bytes) -> None:
    resident = site.start()

    reply, _ = resident.answer(work(0), payload)

    assert reply.refusal == "refused"
    assert site.trainers[0].calls == []
    resident.close()
    assert site.charges == 0


def test_another_schema_than_the_model_gives_is_refused(site: Site, work: Work) -> None:
    asked = work(0)
    other = replace(asked.joined, schema=Schema((TensorSpec("m.A", "m", Role.LORA_A, (2, 4)),)))

    reply, _ = site.start().answer(replace(asked, joined=other), BROADCAST)

    assert reply.refusal == "refused"
    assert site.trainers[0].calls == []
    assert site.charges == 0, "and the ledger is free again"


def test_the_end_of_a_run_clears_the_spool(site: Site, work: Work) -> None:
    resident = site.start()
    resident.answer(work(0), BROADCAST)
    assert site.waiting

    reply, _ = resident.answer(Request(work(0).joined, over=True), b"")

    assert reply.refusal == ""
    assert not site.waiting
    assert site.charges == 1, "and the ledger is free again"


def test_another_run_gets_a_trainer_of_its_own_and_loses_nothing_of_the_first(site: Site, work: Work) -> None:
    resident = site.start()
    first = resident.answer(work(0), BROADCAST)
    other = replace(work(0), joined=replace(work(0).joined, run="run-2"))

    second = resident.answer(other, BROADCAST)

    assert second[1] != first[1]
    assert resident.answer(work(0), BROADCAST) == first
    assert len(site.trainers) == 3
    resident.close()
    assert site.charges == 2


def test_a_spent_budget_is_a_refusal(site: Site, work: Work) -> None:
    site.failure = BudgetError("0.1 of 6 is left")
    resident = site.start()

    reply, payload = resident.answer(work(0), BROADCAST)

    assert (reply.refusal, payload) == ("refused", b"")
    resident.close()


def test_a_failure_that_nobody_foresaw_is_a_refusal_without_its_text_and_everything_is_loaded_anew(
    site: Site, work: Work
) -> None:
    site.failure = RuntimeError("/secret/file")
    resident = site.start()

    reply, _ = resident.answer(work(0), BROADCAST)

    assert reply.refusal == "refused"
    assert "secret" not in str(reply)
    site.failure = None
    assert resident.answer(work(0), BROADCAST)[0].refusal == ""
    assert len(site.trainers) == 2
    resident.close()


def test_a_coordinator_that_restarted_is_answered_and_one_that_changed_the_run_is_not(site: Site, work: Work) -> None:
    resident = site.start()
    first = resident.answer(work(0), BROADCAST)
    restarted = replace(work(0), joined=replace(work(0).joined, epoch=2))
    spec = work(0).joined.spec
    longer = spec.model_copy(update={"train": spec.train.model_copy(update={"steps": 4})})
    changed = replace(work(1), joined=replace(work(0).joined, spec=longer))

    assert resident.answer(restarted, BROADCAST) == first
    assert resident.answer(changed, BROADCAST)[0].refusal == "refused"
    resident.close()
    assert site.charges == 1
