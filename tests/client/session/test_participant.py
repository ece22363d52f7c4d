"""A participant against a scripted coordinator: what it sends, keeps, and never says."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.heartbeat import Timing
from fedloom.client.session.participant import Participant
from fedloom.client.training.trainer import Trainer
from fedloom.core.codecs import codec
from fedloom.core.config.run import Spec
from fedloom.core.errors import (
    BudgetError,
    CodecError,
    ConfigError,
    DataError,
    FedloomError,
    LedgerError,
    ModelError,
    PolicyError,
    ProtocolError,
    SchemaError,
    Unavailable,
    UpdateRejected,
)
from fedloom.core.privacy.accounting import Spend, epsilon
from fedloom.core.schema import Role, Schema, Tensors
from fedloom.proto.messages import Answer, Assignment, Finished, Joined, RoundStatus, UpdateHeader, Wait, upload_schema

FINISHED = Finished(rounds=2, codec="fp32", digest="0" * 64, bytes=0)
ALL = frozenset({Role.LORA_A, Role.LORA_B, Role.HEAD})


@dataclass
class Script:
    """A coordinator that answers from a list, and fails at submissions as told."""

    joined: Joined
    payload: bytes
    answers: list[Answer]
    failures: list[FedloomError | None] = field(default_factory=list)
    closed: int = 0
    """Broadcasts that are refused because their round has closed."""
    leave_fails: bool = False
    told: tuple[float, ...] = ()
    calls: list[str] = field(default_factory=list)
    declared: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    sent: list[tuple[UpdateHeader, bytes]] = field(default_factory=list)

    def join(self, client: str, declared_examples: int) -> Joined:
        self.calls.append("join")
        self.declared.append(declared_examples)
        return self.joined

    def work(self, held: str = "") -> Answer:
        self.calls.append("work")
        return self.answers.pop(0)

    def fetch(self, digest: str, size_bytes: int) -> bytes:
        self.calls.append("fetch")
        assert (digest, size_bytes) == (hashlib.sha256(self.payload).hexdigest(), len(self.payload))
        if self.closed:
            self.closed -= 1
            raise ProtocolError("client 'a' may not fetch now; ask for work first")
        return self.payload

    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        self.calls.append("submit")
        self.sent.append((header, payload))
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure
        return False

    def exchange(self, message: object) -> None:
        raise AssertionError("no secure sum here")

    def heartbeat(self) -> RoundStatus:
        self.calls.append("heartbeat")
        return RoundStatus(0, True, 0)

    def leave(self, reason: str, score: tuple[float, ...] = ()) -> None:
        self.calls.append("leave")
        self.reasons.append(reason)
        self.told = score
        if self.leave_fails:
            raise Unavailable("gone")


def order(schema: Schema, payload: bytes, round: int) -> Assignment:
    digest = hashlib.sha256(payload).hexdigest()
    return Assignment(round, ALL, ALL, digest, len(payload))


@pytest.fixture
def script(tiny_model: AdapterModel, spec: Spec) -> Script:
    """Two rounds, then the end."""
    schema, rng = tiny_model.schema, np.random.default_rng(0)
    values = {s.name: rng.normal(0, 0.1, s.shape).astype(np.float32) for s in schema.tensors}
    payload = codec("fp32").encode(schema, values)
    answers: list[Answer] = [order(schema, payload, 0), Wait(0.0), order(schema, payload, 1), FINISHED]
    return Script(Joined("tiny-1", 1, spec, schema), payload, answers)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger", "sha256:" + "0" * 64) as opened:
        yield opened


@pytest.fixture
def trainer(tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger) -> Trainer:
    return Trainer(tiny_model, rows, spec, policy, ledger)


tireless = partial(Participant, timing=Timing(backoff_s=(0.0, 0.0)))


def giving(trainer: Trainer) -> Callable[[Joined], Trainer]:
    return lambda joined: trainer


def test_a_client_joins_trains_and_submits_until_the_end(
    script: Script, policy: Policy, trainer: Trainer, ledger: Ledger
) -> None:
    participant = tireless(script, policy, giving(trainer))
    assert participant.run() == FINISHED

    assert [c for c in script.calls if c != "heartbeat"] == [
        *("join", "join"),
        *("work", "fetch", "submit", "work", "work", "fetch", "submit", "work"),
        "leave",  # so that the coordinator need not wait for this client
    ]
    assert participant.rounds_trained == 2
    assert script.declared == [0, 40]
    schema = script.joined.schema
    for number, (header, payload) in enumerate(script.sent):
        digest = hashlib.sha256(payload).hexdigest()
        assert header == UpdateHeader("site-a", number, schema.digest, "fp32", len(payload), digest)
        schema.check(codec("fp32").decode(schema, payload))
    assert [(c.run, c.round, c.digest) for c in ledger.charges()] == [
        ("tiny-1", number, header.digest) for number, (header, _) in enumerate(script.sent)
    ]


def test_the_final_adapter_is_handed_over_before_the_client_leaves(
    script: Script, policy: Policy, trainer: Trainer
) -> None:
    digest = hashlib.sha256(script.payload).hexdigest()
    script.answers = [Finished(2, "fp32", digest, len(script.payload))]

    def ended(tensors: Tensors, rounds: int) -> tuple[float, ...]:
        assert rounds == 2
        script.calls.append("ended")
        assert codec("fp32").encode(script.joined.schema, tensors) == script.payload
        return 1.0, 2.0, 3.0

    participant = tireless(script, policy, giving(trainer))
    participant.ended = ended
    participant.run()

    assert script.calls[-3:] == ["fetch", "ended", "leave"]
    assert script.told == (1.0, 2.0, 3.0)


def test_a_final_adapter_of_another_size_is_not_fetched(script: Script, policy: Policy, trainer: Trainer) -> None:
    script.answers = [FINISHED]

    participant = tireless(script, policy, giving(trainer))
    participant.ended = lambda *_: pytest.fail("there is none")
    with pytest.raises(ProtocolError, match="a final adapter of 0 bytes; fp32 under the schema needs"):
        participant.run()

    assert "fetch" not in script.calls


def test_the_digest_is_in_the_ledger_before_the_first_byte_leaves(
    script: Script, policy: Policy, trainer: Trainer, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[str | None] = []

    def submit(header: UpdateHeader, payload: bytes) -> bool:
        noted.append(ledger.charges()[-1].digest)
        return Script.submit(script, header, payload)

    monkeypatch.setattr(script, "submit", submit)
    tireless(script, policy, giving(trainer)).run()

    assert noted == [header.digest for header, _ in script.sent]


@pytest.mark.parametrize("leave_fails", [False, True])
def test_a_refused_run_is_left_without_a_word_of_why(script: Script, policy: Policy, leave_fails: bool) -> None:
    strict = policy.model_copy(update={"privacy": policy.privacy.model_copy(update={"min_noise_multiplier": 2.0})})
    script.leave_fails = leave_fails
    participant = tireless(script, strict, lambda _: pytest.fail("the data was read"))

    with pytest.raises(PolicyError, match=r"noise multiplier 1 \(at least 2\)"):
        participant.run()

    assert script.calls == ["join", "leave"]
    assert script.reasons == ["refused"]


@pytest.mark.parametrize("kind", [PolicyError, BudgetError, ModelError, SchemaError, LedgerError, ConfigError])
def test_a_site_that_cannot_prepare_says_one_word(script: Script, policy: Policy, kind: type[FedloomError]) -> None:
    def prepare(_: Joined) -> Trainer:
        raise kind("srv/ward-3/ledger")

    with pytest.raises(kind, match="ward-3"):
        tireless(script, policy, prepare).run()

    assert script.reasons == ["refused"]


@pytest.mark.parametrize("kind", [DataError, MemoryError, RuntimeError])
def test_what_may_be_the_datas_doing_ends_in_silence(script: Script, policy: Policy, kind: type[Exception]) -> None:
    def prepare(_: Joined) -> Trainer:
        raise kind("ward-3/patients.csv: row 7 has no label")

    with pytest.raises(kind, match="patients"):
        tireless(script, policy, prepare).run()

    assert script.calls == ["join"]


def test_a_run_with_another_schema_is_refused_every_time(script: Script, policy: Policy, trainer: Trainer) -> None:
    script.joined = replace(script.joined, schema=script.joined.schema.with_rank(2))
    participant = tireless(script, policy, giving(trainer))

    for _ in range(2):
        with pytest.raises(SchemaError, match="use the base model and adapter section that the run names"):
            participant.join()

    assert script.reasons == ["refused"] * 2


@pytest.mark.parametrize("lost", [1, 3])
def test_an_update_lost_on_the_way_is_sent_again_as_it_was(
    script: Script, policy: Policy, trainer: Trainer, ledger: Ledger, lost: int
) -> None:
    script.failures = [Unavailable("lost")] * lost

    participant = tireless(script, policy, giving(trainer))
    participant.run()

    first = script.sent[: lost + 1]
    assert len(script.sent) == lost + 2
    assert all(sent == first[0] for sent in first)
    assert script.sent[-1][0].round == 1
    assert participant.rounds_trained == 2
    assert len(ledger.charges()) == 2
    after_loss = [c for c in script.calls if c != "heartbeat"][5:]
    assert after_loss[: 2 * lost] == ["join", "submit"] * lost


def test_an_update_the_coordinator_does_not_want_is_dropped(
    script: Script, policy: Policy, trainer: Trainer, ledger: Ledger
) -> None:
    script.failures = [ProtocolError("round 1 is closed")] * 2  # before and after joining again

    participant = tireless(script, policy, giving(trainer))

    assert participant.run() == FINISHED
    assert [header.round for header, _ in script.sent] == [0, 0, 1]
    assert script.sent[0] == script.sent[1]
    assert participant.rounds_trained == 1
    assert len(ledger.charges()) == 2


def test_a_client_whose_round_closes_before_it_has_the_broadcast_takes_part_in_the_next(
    script: Script, policy: Policy, trainer: Trainer, ledger: Ledger
) -> None:
    script.closed = 2  # once, and once more after it has joined again

    tireless(script, policy, lambda _: trainer).run()

    assert [header.round for header, _ in script.sent] == [1]
    assert [charge.round for charge in ledger.charges()] == [1]


def test_a_refused_update_is_not_sent_again(script: Script, policy: Policy, trainer: Trainer, ledger: Ledger) -> None:
    script.failures = [UpdateRejected("NaN")]

    participant = tireless(script, policy, giving(trainer))

    assert participant.run() == FINISHED
    assert [header.round for header, _ in script.sent] == [0, 1]
    assert participant.rounds_trained == 1


def test_a_spent_budget_ends_the_clients_part(
    script: Script, policy: Policy, spec: Spec, tiny_model: AdapterModel, rows: Rows, ledger: Ledger
) -> None:
    one_round = epsilon([Spend(0.3, 1.0, 3)], policy.privacy.delta)
    poor = policy.model_copy(update={"privacy": policy.privacy.model_copy(update={"epsilon": one_round})})
    participant = tireless(script, poor, giving(Trainer(tiny_model, rows, spec, poor, ledger)))

    with pytest.raises(BudgetError, match=r"round 2 of run 'tiny-1' would bring epsilon to"):
        participant.run()

    assert script.reasons == ["refused"]
    assert len(script.sent) == 1
    assert len(ledger.charges()) == 1


@pytest.mark.parametrize("changed", ["spec", "run"])
def test_a_coordinator_that_comes_back_with_another_run_is_refused(
    script: Script, policy: Policy, trainer: Trainer, spec: Spec, changed: str
) -> None:
    participant = tireless(script, policy, giving(trainer))
    participant.join()
    longer = spec.model_copy(update={"train": spec.train.model_copy(update={"steps": 4})})
    script.joined = replace(script.joined, **({"spec": longer} if changed == "spec" else {"run": "tiny-2"}))

    with pytest.raises(ProtocolError, match="changed the run while this client was away"):
        participant.join()

    assert script.reasons == ["refused"]


def test_a_restarted_coordinator_with_the_same_run_is_joined_again(
    script: Script, policy: Policy, trainer: Trainer
) -> None:
    participant = tireless(script, policy, giving(trainer))
    participant.join()
    script.joined = replace(script.joined, epoch=2)

    assert participant.join().epoch == 2
    assert script.declared == [0, 40, 40]


@pytest.mark.parametrize("wrong", [{"broadcast_bytes": 4}, {"upload_codec": "zip"}], ids=["length", "codec"])
def test_an_order_that_does_not_fit_is_refused_before_any_charge(
    script: Script, policy: Policy, trainer: Trainer, ledger: Ledger, wrong: dict[str, Any]
) -> None:
    whole = order(script.joined.schema, script.payload, 0)
    script.answers = [replace(whole, **wrong)]
    participant = tireless(script, policy, giving(trainer))

    with pytest.raises((ProtocolError, CodecError), match=r"broadcast of \d+ bytes|unknown codec 'zip'"):
        participant.run()

    assert ledger.charges() == []
    assert "fetch" not in script.calls


def test_patience_has_an_end(script: Script, policy: Policy, trainer: Trainer) -> None:
    script.failures = [Unavailable("lost")]

    with pytest.raises(Unavailable, match="lost"):
        tireless(script, policy, giving(trainer)).run(patience_s=-1.0)


def test_a_line_that_is_cut_in_every_poll_does_not_use_up_patience(
    script: Script, policy: Policy, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that closes idle connections: whoever can be joined again is there."""
    now, cuts = [0.0], 20
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def work(held: str) -> Answer:
        nonlocal cuts
        now[0] += 10.0
        cuts -= 1
        if cuts:
            raise Unavailable("Socket closed")
        return FINISHED

    monkeypatch.setattr(script, "work", work)

    assert tireless(script, policy, giving(trainer)).run(patience_s=30.0) == FINISHED
    assert now[0] == 200.0


def test_an_update_uses_the_codec_and_rank_of_its_order(script: Script, policy: Policy, trainer: Trainer) -> None:
    small = script.joined.schema.with_rank(2)
    payload = codec("fp32").encode(small, small.zeros())
    script.payload = payload
    script.answers = [replace(order(small, payload, 0), rank=2, upload_codec="fp16"), FINISHED]

    tireless(script, policy, giving(trainer)).run()

    header, body = script.sent[0]
    upload = upload_schema(script.joined.schema, Assignment(0, ALL, ALL, "", 0, rank=2))
    assert (header.schema_digest, header.codec, len(body)) == (upload.digest, "fp16", 2 * upload.size)
