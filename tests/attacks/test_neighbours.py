"""A coordinator that asks about one row: whatever the data are, it gets the same messages at the same times.

A whole client runs on neighbouring data sets, from reading its data to the end of the run, over a real socket. All that
a scripted coordinator hears is compared byte by byte: which messages, in which order, of which length, and when by the
client's own clock, on which reading and training take a time that depends on the data.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.client.data import site_data as own_module
from fedloom.client.data.rows import Rows
from fedloom.client.data.site_data import own_data, own_rows
from fedloom.client.models.load import load_model
from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.api import CheckCancelled, Trained
from fedloom.client.session.heartbeat import Timing
from fedloom.client.session.participant import Participant
from fedloom.client.session.prepare import prepare
from fedloom.client.session.send_times import Pace
from fedloom.client.training.trainer import Trainer
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.codecs import codec
from fedloom.core.config.run import Spec
from fedloom.core.errors import DataError, FedloomError
from fedloom.core.schema import Tensors
from fedloom.proto.messages import REFUSED, Answer, Assignment, Finished, Joined
from fedloom.proto.v1 import federation_pb2 as pb
from tests.attacks.scripted import Clock, Scripted, listening

FULL = os.environ.get("FEDLOOM_PROVE") == "1"

Row = dict[str, Any]
Heard = tuple[list[tuple[float, str, bytes, tuple[int, ...]]], set[bytes]]


@dataclass
class Slow:
    """The real trainer, whose work takes a time that depends on the rows."""

    trainer: Trainer
    scripted: Scripted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trainer, name)

    def train(self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled) -> Trained:
        assert self.scripted.beaten.wait(60), "a client at work sends heartbeats"
        trained = self.trainer.train(run, assignment, broadcast, check_cancelled)
        self.scripted.clock.now += 1.26 + 1e-5 * sum(map(len, self.trainer.encoded.input_ids))
        return trained


@dataclass
class Site:
    """A machine with data, and what a coordinator hears of it."""

    folder: Path
    policy: Policy
    spec: Spec
    monkeypatch: pytest.MonkeyPatch
    lives: int = 0

    def hears(self, rows: list[Row] | bytes, spec: Spec | None = None, rounds: int = 2) -> Heard:
        """Everything that leaves the site in one life, whatever ends it."""
        self.lives += 1
        home = self.folder / str(self.lives)
        home.mkdir()
        lines = rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
        (home / "train.jsonl").write_bytes(lines)
        policy = self.policy.model_copy(
            update={
                "client": self.policy.client.model_copy(update={"state": home, "anchors": home / "anchors"}),
                "data": self.policy.data.model_copy(update={"source": str(home / "train.jsonl")}),
            }
        )
        scripted = _coordinator(self.spec, spec or self.spec, rounds)

        def reading(policy: Policy) -> Rows:
            found = own_rows(policy)
            scripted.clock.now += 0.2 + 1e-4 * sum(map(len, found.texts))
            return found

        self.monkeypatch.setattr(own_module, "own_rows", reading)
        with (
            listening(scripted) as address,
            closing(GrpcConnection(address)) as line,
            suppress(FedloomError),
        ):
            _life(policy, line, scripted)
        return scripted.heard, scripted.beats


def _life(policy: Policy, line: GrpcConnection, scripted: Scripted) -> None:
    """What `fedloom client` does."""
    clock, made = scripted.clock, []
    pace = Pace(clock, clock.sleep)
    own = own_data(policy, pace)

    def ready(joined: Joined) -> Slow:
        assert own is not None
        clock.now += 0.3 + 1e-4 * sum(map(len, own.rows.texts))
        made.append(prepare(policy, joined.spec, own))
        return Slow(made[-1], scripted)

    try:
        Participant(line, policy, ready, pace=pace, timing=Timing(heartbeat_s=0.01)).run()
    finally:
        if made and isinstance(made[0].ledger, Ledger):
            made[0].ledger.close()


def _coordinator(known: Spec, asked: Spec, rounds: int) -> Scripted:
    """Asks for `asked`, with the schema and values of `known`."""
    schema = load_model(known.model, known.adapter).schema
    rng = np.random.default_rng(0)
    values = {each.name: rng.normal(0, 0.1, each.shape).astype(np.float32) for each in schema.tensors}
    payload = codec("fp32").encode(schema, values)
    digest, roles = hashlib.sha256(payload).hexdigest(), schema.roles
    orders: list[Answer] = [Assignment(number, roles, roles, digest, len(payload)) for number in range(rounds)]
    ended = Finished(rounds=rounds, codec="fp32", digest="0" * 64, bytes=0)
    return Scripted(Joined("tiny-1", 1, asked, schema), payload, [*orders, ended], Clock())


@pytest.fixture
def site(tmp_path: Path, policy: Policy, spec: Spec, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site whose policy allows private runs only."""
    private = policy.privacy.model_copy(update={"allow_non_private": False})
    (tmp_path / "sites").mkdir()
    return Site(tmp_path / "sites", policy.model_copy(update={"privacy": private}), spec, monkeypatch)


@pytest.fixture
def base(rows: Rows) -> list[Row]:
    names = [rows.label_names[label] for label in rows.labels]
    return [{"text": text, "label": name} for text, name in zip(rows.texts, names, strict=True)]


SOUND: dict[str, Callable[[list[Row]], list[Row]]] = {
    "added": lambda base: [*base, {"text": "a quite different text", "label": "positive"}],
    "removed": lambda base: base[:-1],
    "changed": lambda base: [{**base[0], "text": "nothing of what was there"}, *base[1:]],
    "relabelled": lambda base: [{**base[0], "label": "negative"}, {**base[1], "label": "1"}, *base[2:]],
    "too long": lambda base: [*base, {"text": "very sad " * 2000, "label": "negative"}],
    "unicode": lambda base: [*base, {"text": "\u200b\u0301 \U0001f600 \ufdfa\x00\ufffd", "label": "negative"}],
    "twice": lambda base: [*base, base[0]],
    "another order": lambda base: base[::-1],
    "a group": lambda base: [{**base[0], "group": "ward 3"}, *base[1:]],
    "other columns": lambda base: [{**row, "id": number} for number, row in enumerate(base)],
    "half": lambda base: base[::2],
    "one row": lambda base: base[:1],
}
"""Data that the policy takes."""

MALFORMED: dict[str, Callable[[list[Row]], list[Row] | bytes]] = {
    "label": lambda base: [*base, {"text": "fine", "label": "neutral"}],
    "index": lambda base: [*base, {"text": "fine", "label": 2}],
    "no label": lambda base: [*base, {"text": "fine"}],
    "two contents": lambda base: [*base, {"text": "fine", "label": "positive", "prompt": "fine"}],
    "blank": lambda base: [*base, {"text": " ", "label": "positive"}],
    "half of a pair": lambda base: [*base, {"text": "\ud83d", "label": "positive"}],
    "a number": lambda base: [*base, {"text": 3, "label": "positive"}],
    "no row": lambda base: [],
    "no object": lambda base: b"[1, 2]\n",
    "no JSON": lambda base: b'{"text": "fine", "label\n',
    "no UTF-8": lambda base: b'{"text": "caf\xe9", "label": "positive"}\n',
}
"""Data that it does not."""

QUESTIONS: dict[str, dict[str, Any]] = {
    "swapped": {"labels": ("positive", "negative")},
    "without one": {"labels": ("negative", "other")},
    "one more": {"labels": ("negative", "positive", "neutral")},
    "by index": {"labels": ("0", "1")},
    "tokens": {"task": "token-classification"},
    "language": {"task": "causal-lm", "labels": (), "head": "frozen"},
    "pictures": {"task": "image-classification"},
    "no such model": {"base": "/nowhere"},
    "another model": {"digest": "sha256:" + "0" * 64},
}
"""What a coordinator may put into [model] to have rows refused that it asks about."""


def _kinds(heard: Heard) -> list[str]:
    return [kind for _, kind, _, _ in heard[0]]


@pytest.mark.parametrize("change", SOUND if FULL else ["added", "removed", "changed", "too long", "unicode"])
@pytest.mark.prove
def test_neighbouring_data_give_the_same_messages_at_the_same_times(site: Site, base: list[Row], change: str) -> None:
    first, second = site.hears(base), site.hears(SOUND[change](base))

    assert _kinds(first) == [
        *("JoinRequest", "JoinRequest"),
        *(*("WorkRequest", "FetchRequest", "SubmitRequest"),) * 2,
        *("WorkRequest", "LeaveRequest"),
    ]
    assert first == second
    assert len(first[1]) == 1, "heartbeats are compared too"
    moments = sorted({moment for moment, _, _, _ in first[0]})
    assert moments == [5.0, 10.0, 11.375, 12.75], "a public grid"


def test_the_comparison_would_see_the_time_that_work_takes(
    site: Site, base: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "_wait", lambda *_: None)

    first, second = site.hears(base), site.hears(SOUND["too long"](base))

    assert _kinds(first) == _kinds(second)
    assert first != second


@pytest.mark.parametrize("change", MALFORMED if FULL else ["label", "no label", "blank", "no row", "no UTF-8"])
@pytest.mark.prove
def test_a_malformed_row_is_found_before_anything_is_sent(site: Site, base: list[Row], change: str) -> None:
    asked = [site.spec, *(_asking(site.spec, question) for question in (QUESTIONS if FULL else ["without one"]))]

    for spec in asked:
        assert site.hears(MALFORMED[change](base), spec) == ([], set())


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.prove
def test_what_a_run_asks_of_rows_is_refused_alike_whatever_they_are(site: Site, base: list[Row], question: str) -> None:
    """The label oracle: on the first release one message told whether a row has the label that was left out."""
    asked = _asking(site.spec, question)
    expected = site.hears(base, asked)

    (_, _, content, _) = expected[0][-1]
    assert _kinds(expected) == ["JoinRequest", "LeaveRequest"]
    assert pb.LeaveRequest.FromString(content).reason == REFUSED
    for change in SOUND if FULL else ["one row"]:
        assert site.hears(SOUND[change](base), asked) == expected, change


def _asking(spec: Spec, question: str) -> Spec:
    model = spec.model.model_validate(spec.model.model_dump() | QUESTIONS[question])
    return spec.model_copy(update={"model": model})


@pytest.mark.prove
def test_a_short_max_length_says_nothing_about_long_rows(site: Site, base: list[Row]) -> None:
    short = site.spec.model_copy(update={"model": site.spec.model.model_copy(update={"max_length": 8})})

    assert site.hears(base, short) == site.hears(SOUND["too long"](base), short)
    assert "SubmitRequest" in _kinds(site.hears(base[:1], short))


REFUSING = (
    "{% for each in messages %}{% if each['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ each['role'] + ':' + each['content'] + '</s>' }}{% endfor %}"
)


@pytest.mark.prove
def test_a_chat_template_that_refuses_a_row_does_not_tell(
    site: Site, small_bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "chat"
    folder.mkdir()
    for file in small_bases["llama"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(REFUSING)
    model = site.spec.model.model_validate(
        {"base": str(folder), "task": "instruct", "head": "frozen", "max_length": 24, "labels": ()}
    )
    adapter = site.spec.adapter.model_copy(update={"rank": 2, "targets": ("q_proj", "v_proj")})
    site.spec = site.spec.model_copy(update={"model": model, "adapter": adapter})
    data = site.policy.data.model_copy(update={"task": "instruct", "labels": ()})
    site.policy = site.policy.model_copy(update={"data": data})
    talk = [{"role": "user", "content": "good film"}, {"role": "assistant", "content": "very"}]
    base = [{"messages": [{**talk[0], "content": f"good film {number}"}, talk[1]]} for number in range(20)]
    odd = {"messages": [{"role": "system", "content": "be brief"}, *talk]}

    first, second = site.hears(base), site.hears([*base, odd])

    assert _kinds(first).count("SubmitRequest") == 2
    assert first == second


def test_a_policy_of_the_first_release_says_what_to_add_before_anything_is_sent(site: Site, base: list[Row]) -> None:
    data = site.policy.data.model_copy(update={"labels": ()})
    site.policy = site.policy.model_copy(update={"data": data})

    with pytest.raises(FedloomError, match=r'add `labels = \["...", "..."\]` to its section \[data\]'):
        own_data(site.policy)
    assert site.hears(base) == ([], set())


def test_where_a_policy_allows_runs_without_privacy_a_private_one_is_still_refused_alike(
    site: Site, base: list[Row]
) -> None:
    site.policy = site.policy.model_copy(
        update={
            "data": site.policy.data.model_copy(update={"labels": ()}),
            "privacy": site.policy.privacy.model_copy(update={"allow_non_private": True}),
        }
    )

    heard = [site.hears(rows) for rows in (base, MALFORMED["label"](base), MALFORMED["no UTF-8"](base))]

    assert _kinds(heard[0]) == ["JoinRequest", "LeaveRequest"]
    assert heard[0] == heard[1] == heard[2]


def test_the_data_are_refused_here_with_the_reason(site: Site, base: list[Row]) -> None:
    site.hears(MALFORMED["label"](base))
    source = site.policy.data.model_copy(update={"source": str(site.folder / "1" / "train.jsonl")})

    with pytest.raises(DataError, match="line 41: a label is not among those expected"):
        own_data(site.policy.model_copy(update={"data": source}))
