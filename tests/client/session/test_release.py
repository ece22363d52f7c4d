"""What a private client sends is a function of public values and of the noised update, field by field."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.dp_sgd.rng import Entropy, Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.participant import Participant
from fedloom.client.training.trainer import Trainer
from fedloom.core.codecs import codec
from fedloom.core.config.evaluation import FederatedEvaluationSection
from fedloom.core.config.run import Spec
from fedloom.core.errors import ModelError
from fedloom.core.privacy.gaussian import Integers
from fedloom.core.schema import Role
from fedloom.proto.messages import Answer, Assignment, Finished, Joined, RoundStatus, UpdateHeader
from fedloom.proto.v1 import federation_pb2 as pb

ALL = frozenset({Role.LORA_A, Role.LORA_B, Role.HEAD})
FINISHED = Finished(rounds=2, codec="fp32", digest="0" * 64, bytes=0)


@dataclass
class Recorder:
    """A coordinator that keeps every argument of every call; heartbeats, whose number is a matter of time, once."""

    joined: Joined
    payload: bytes
    answers: list[Answer]
    messages: list[tuple[Any, ...]] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)

    def join(self, client: str, declared_examples: int) -> Joined:
        self.messages.append(("join", client, declared_examples))
        return self.joined

    def work(self, held: str = "") -> Answer:
        self.messages.append(("work",))
        return self.answers.pop(0)

    def fetch(self, digest: str, size_bytes: int) -> bytes:
        self.messages.append(("fetch", digest, size_bytes))
        return self.payload

    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        known = {each.name: getattr(header, each.name) for each in fields(header)}
        assert known.pop("digest") == hashlib.sha256(payload).hexdigest()
        self.messages.append(("submit", known, len(payload)))
        self.payloads.append(payload)
        return False

    def exchange(self, message: object) -> None:
        raise AssertionError("no secure sum here")

    def heartbeat(self) -> RoundStatus:
        """Has no field."""
        return RoundStatus(0, True, 0)

    def leave(self, reason: str, score: tuple[float, ...] = ()) -> None:
        self.messages.append(("leave", reason, {"score": score}))


class Silent:
    """Samples no one; its noise does not depend on how many examples there are."""

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        return np.ones(count)

    def normal(self, deviation: int, count: int) -> Integers:
        return Seeded(count).normal(deviation, count)


EntropyFor = Callable[[int], Entropy] | None
Life = Callable[[Rows, EntropyFor], Recorder]


def live(
    model: AdapterModel, spec: Spec, policy: Policy, folder: Path, rows: Rows, entropy_for: EntropyFor
) -> Recorder:
    """Run a whole private client on some data; what it sent."""
    schema = model.schema
    rng = np.random.default_rng(0)
    values = {s.name: rng.normal(0, 0.1, s.shape).astype(np.float32) for s in schema.tensors}
    payload = codec("fp32").encode(schema, values)
    digest = hashlib.sha256(payload).hexdigest()
    orders = [Assignment(number, ALL, ALL, digest, len(payload)) for number in (0, 1)]
    scored = spec.federated_evaluation.enabled
    finished = Finished(2, "fp32", digest, len(payload)) if scored else FINISHED
    recorder = Recorder(Joined("tiny-1", 1, spec, schema), payload, [*orders, finished])
    with Ledger(folder, "sha256:" + "0" * 64) as ledger:
        trainer = Trainer(model, rows, spec, policy, ledger, entropy_for=entropy_for)
        participant = Participant(recorder, policy, lambda _: trainer)
        participant.ended = (lambda result, rounds: trainer.score("tiny-1", rounds, result)) if scored else None
        participant.run()
    return recorder


@pytest.fixture
def life(tiny_model: AdapterModel, spec: Spec, policy: Policy, tmp_path: Path) -> Life:
    """Runs the client of these fixtures."""

    def run(rows: Rows, entropy_for: EntropyFor) -> Recorder:
        return live(tiny_model, spec, policy, tmp_path / str(len(list(tmp_path.iterdir()))), rows, entropy_for)

    return run


def other(rows: Rows) -> Rows:
    """Fewer, longer examples with other texts and labels."""
    few = rows.take(np.arange(13))
    return Rows(tuple(f"{text} sad actor" for text in few.texts), 1 - few.labels, few.groups, few.label_names)


def test_every_field_but_the_noised_update_is_the_same_for_any_data(life: Life, rows: Rows) -> None:
    first, second = life(rows, None), life(other(rows), None)

    assert first.messages == second.messages
    assert [message[0] for message in first.messages].count("submit") == 2
    assert ("join", "site-a", 40) in first.messages
    assert first.payloads != second.payloads


def test_the_update_depends_on_the_data_only_through_the_sampled_and_noised_sum(life: Life, rows: Rows) -> None:
    first, second = life(rows, lambda _: Silent()), life(other(rows), lambda _: Silent())

    assert first.payloads == second.payloads
    assert any(first.payloads[0])


def test_sampled_examples_do_change_the_update(life: Life, rows: Rows) -> None:
    """The comparison above would see a difference."""
    first, second = life(rows, lambda r: Seeded(r)), life(other(rows), lambda r: Seeded(r))

    assert first.messages == second.messages
    assert first.payloads != second.payloads


def test_an_evaluation_adds_noised_figures_and_nothing_else(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, tmp_path: Path
) -> None:
    scored = spec.model_copy(update={"federated_evaluation": FederatedEvaluationSection(enabled=True)})
    site = policy.model_copy(update={"data": policy.data.model_copy(update={"held_out": 0.3})})
    first, second = (
        live(tiny_model, scored, site, tmp_path / name, data, None) for name, data in (("a", rows), ("b", other(rows)))
    )
    figures = [
        [part.pop("score") for message in each.messages for part in message if isinstance(part, dict)]
        for each in (first, second)
    ]

    assert first.messages == second.messages
    assert [len(score) for score in figures[0]] == [3, 3, 3], "of two rounds, and of the result"
    assert len({value for each in figures for score in each for value in score}) == 18, "noise is never the same"


def test_a_failed_probe_is_told_as_a_refusal_and_no_more(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mixing(self: Trainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model.logits(batch).std()

    monkeypatch.setattr(Trainer, "_batch_loss", mixing)
    recorder = Recorder(Joined("tiny-1", 1, spec, tiny_model.schema), b"", [])
    with (
        Ledger(tmp_path / "ledger", "sha256:" + "0" * 64) as ledger,
        pytest.raises(ModelError, match="sensitivity probe: "),
    ):
        Participant(recorder, policy, lambda _: Trainer(tiny_model, rows, spec, policy, ledger)).run()

    assert recorder.messages == [("join", "site-a", 0), ("leave", "refused", {"score": ()})]


# What a message to the coordinator may hold. A field that is added here needs a reason why it is public, or noise.
PUBLIC = {
    "JoinRequest": {"client", "protocol", "declared_examples"},
    # Of an adapter that the coordinator itself has sent.
    "WorkRequest": {"run", "epoch", "client", "held"},
    "FetchRequest": {"run", "epoch", "client", "digest", "offset"},
    "SubmitRequest": {"header", "data"},
    # The offset says how much of the noised update has arrived before; the score is noised, see test_evaluation.py.
    "UpdateHeader": {
        *("run", "epoch", "client", "round", "schema_digest", "codec", "payload_bytes", "digest", "attempt", "offset"),
        "score",
    },
    # Keys, shares of keys and signatures of a secure sum: drawn at random, whatever the update is.
    "ExchangeRequest": {"run", "epoch", "client", "round", "attempt", "step", "parts"},
    "HeartbeatRequest": {"run", "epoch", "client"},
    # Figures on the result are noised as those of a round are, see test_evaluation.py.
    "LeaveRequest": {"run", "epoch", "client", "reason", "score"},
}


def test_no_message_to_the_coordinator_has_a_field_that_is_not_listed() -> None:
    requests = {method.input_type.name for method in pb.DESCRIPTOR.services_by_name["Federation"].methods}
    messages = pb.DESCRIPTOR.message_types_by_name

    assert requests | {"UpdateHeader"} == set(PUBLIC)
    for name, public in PUBLIC.items():
        assert {each.name for each in messages[name].fields} == public, name
    assert {each.name for each in fields(UpdateHeader)} <= PUBLIC["UpdateHeader"]
