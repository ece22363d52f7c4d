"""Clients that send what no honest client would, against a real coordinator process: rows C1, C6, C7, C8 and C10.

Whatever one client sends, it alone is refused, with a status from a short list; the others' round closes, and the
adapter is that of a run without the message, bit for bit.
"""

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message

from fedloom.proto.messages import Assignment, UpdateHeader
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.wire import header_to_wire
from tests.faults_server.serving import SCHEMA, Client, served, update
from tests.proto.mutating import garbled, twisted

Code = grpc.StatusCode
ALLOWED = {
    Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION, Code.OUT_OF_RANGE, Code.RESOURCE_EXHAUSTED, Code.PERMISSION_DENIED,
    Code.UNIMPLEMENTED,
}  # fmt: skip
LOW = SCHEMA.with_rank(1)
Sent = tuple[UpdateHeader, bytes]


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert isinstance(caught.value, grpc.Call)
    return caught.value.code(), caught.value.details() or ""


@contextmanager
def opened(folder: Path, **options: object) -> Iterator[tuple[list[Client], Assignment]]:
    """Ann, Ben and Eve in the cohort of the open first round, and what they are asked to do."""
    with served(folder, "ann", "ben", "eve", expect=3, **options) as clients:
        for client in clients:
            client.join(examples=10)
        asked = [client.ask() for client in clients]
        answers = [client.answer(each) for client, each in zip(clients, asked, strict=True)]
        assert isinstance(answers[0], Assignment)
        assert all(answer == answers[0] for answer in answers)
        yield clients, answers[0]


def over(honest: list[Client], first: Assignment) -> bytes:
    """Two clients through the whole run; its final adapter."""
    for number in range(2):
        asked = [client.ask() for client in honest] if number else []
        answers = [client.answer(each) for client, each in zip(honest, asked, strict=True)] if number else [first] * 2
        for client, answer in zip(honest, answers, strict=True):
            assert isinstance(answer, Assignment)
            assert answer.round == number
            assert client.submit(*update(client.name, answer)) is False
    final = honest[0].final()
    assert honest[1].final() == final
    return final


def body(sent: Sent, payload: bytes) -> Sent:
    """The payload in place of the sent one, under a header that fits it."""
    digest = hashlib.sha256(payload).hexdigest()
    return replace(sent[0], payload_bytes=len(payload), digest=digest), payload


def filled(sent: Sent, value: float) -> Sent:
    values = np.frombuffer(sent[1], "<f4").copy()
    values[len(values) // 2] = value
    return body(sent, values.tobytes())


FORMS: dict[str, Callable[[Sent], Sent]] = {
    # C1: other shapes and types than were asked for.
    "a value too few": lambda sent: body(sent, sent[1][:-4]),
    "a value too many": lambda sent: body(sent, sent[1] + bytes(4)),
    "half precision": lambda sent: (replace(body(sent, sent[1][::2])[0], codec="fp16"), sent[1][::2]),
    "a codec there is not": lambda sent: (replace(sent[0], codec="pickle"), sent[1]),
    "nothing": lambda sent: body(sent, b""),
    "another schema": lambda sent: (replace(sent[0], schema_digest="ab" * 32), sent[1]),
    "a schema that is no digest": lambda sent: (replace(sent[0], schema_digest="../../etc"), sent[1]),
    "the same schema at rank 1": lambda sent: (
        replace(body(sent, sent[1][: 4 * LOW.size])[0], schema_digest=LOW.digest),
        sent[1][: 4 * LOW.size],
    ),
    "other bytes than announced": lambda sent: (sent[0], sent[1][:-1] + bytes([sent[1][-1] ^ 1])),
    # C6: another round, client or sum.
    "a round to come": lambda sent: (replace(sent[0], round=1), sent[1]),
    "a round far away": lambda sent: (replace(sent[0], round=2**32 - 1), sent[1]),
    "somebody who is not there": lambda sent: (replace(sent[0], client="mallory"), sent[1]),
    "a name that is none": lambda sent: (replace(sent[0], client="\0" * 300), sent[1]),
    "a secure sum": lambda sent: (replace(sent[0], codec="secagg32", attempt=7), sent[1]),
    # C8: more than fits.
    "4 GiB announced": lambda sent: (replace(sent[0], payload_bytes=4 << 30), sent[1]),
    "more than any payload": lambda sent: (replace(sent[0], payload_bytes=2**64 - 1), sent[1]),
    "a gigabyte announced and begun": lambda sent: (replace(sent[0], payload_bytes=1 << 30), bytes(3 << 20)),
    "more than announced": lambda sent: (sent[0], sent[1] + bytes(3 << 20)),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The final adapter of a run in which Eve leaves without a word."""
    with opened(tmp_path_factory.mktemp("honest")) as ((ann, ben, eve), assignment):
        eve.leave()
        return over([ann, ben], assignment)


@pytest.mark.e2e
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_update_that_does_not_fit_touches_the_others_round(tmp_path: Path, expected: bytes, value: str) -> None:
    with opened(tmp_path) as ((ann, ben, eve), assignment):
        good = update("eve", assignment)
        for name, spoil in FORMS.items():
            code, text = refused(partial(eve.submit, *spoil(good)))
            assert code in ALLOWED, f"{name}: {code} {text}"
        # Only now, for after this Eve is heard no more in the round.
        assert refused(lambda: eve.submit(*filled(good, float(value))))[0] is Code.OUT_OF_RANGE
        assert refused(lambda: eve.submit(*good))[0] is Code.OUT_OF_RANGE
        eve.leave()

        assert over([ann, ben], assignment) == expected


@pytest.mark.e2e
def test_a_replay_counts_for_nothing(tmp_path: Path, expected: bytes) -> None:
    """C6: the same again, something else again, an older round, another run or epoch, in another's name."""
    with opened(tmp_path) as ((ann, ben, eve), assignment):
        eve.leave()
        first = update("ann", assignment)
        assert ann.submit(*first) is False
        assert [ann.submit(*first) for _ in range(3)] == [True] * 3
        code, text = refused(lambda: ann.submit(*update("ann", assignment, 2.0)))
        assert (code, "already sent another update" in text) == (Code.FAILED_PRECONDITION, True)
        for field, value in (("run", "another"), ("epoch", 0), ("epoch", 2)):
            stranger = Client(ben.address, "ben")
            stranger.run, stranger.epoch = ben.run, ben.epoch
            setattr(stranger, field, value)
            assert refused(partial(stranger.submit, *update("ben", assignment)))[0] is Code.FAILED_PRECONDITION
            stranger.channel.close()
        assert ben.submit(*update("ben", assignment)) is False
        # The round is over: its updates are still known, and no other takes their place.
        assert ann.submit(*first) is True
        assert refused(lambda: ann.submit(*update("ann", assignment, 2.0)))[0] is Code.FAILED_PRECONDITION
        asked = [ann.ask(), ben.ask()]
        for client, each in zip((ann, ben), asked, strict=True):
            answer = client.answer(each)
            assert isinstance(answer, Assignment)
            assert client.submit(*update(client.name, answer)) is False

        assert ann.final() == expected


@pytest.mark.e2e
def test_a_lie_about_the_number_of_examples_is_refused(tmp_path: Path) -> None:
    """C7: what no data set has is no weight; the others' weights are what they declared."""
    weighted = {"strategy": {"name": "fedavg", "weighting": "examples"}}
    finals = []
    for lies in ((), (10**18, 2**64 - 1, 10**12 + 1)):
        with opened(tmp_path / str(len(lies)), config=weighted) as ((ann, ben, eve), assignment):
            for lie in lies:
                assert refused(partial(eve.join, lie))[0] is Code.INVALID_ARGUMENT
            eve.join(0)
            assert refused(eve.work)[0] is Code.INVALID_ARGUMENT
            eve.leave()
            finals.append(over([ann, ben], assignment))
    assert finals[0] == finals[1]


@pytest.mark.e2e
def test_a_bomb_is_refused_before_it_takes_memory(tmp_path: Path, expected: bytes) -> None:
    """C8: small on the wire and large in memory, by compression or by many small parts."""
    with opened(tmp_path) as ((ann, ben, eve), assignment):
        header = pb.SubmitRequest(header=header_to_wire(update("eve", assignment)[0], eve.run, eve.epoch))
        before_mib = eve.peak_mib()
        bomb = iter([header, pb.SubmitRequest(data=bytes(96 << 20))])
        code, _ = refused(lambda: eve.stub.Submit(bomb, compression=grpc.Compression.Gzip, timeout=60))
        assert code is Code.RESOURCE_EXHAUSTED
        address = {"run": eve.run, "epoch": eve.epoch, "client": "eve"}
        for count, said in ((300_000, Code.RESOURCE_EXHAUSTED), (2_000, Code.FAILED_PRECONDITION)):
            parts = pb.ExchangeRequest(**address, step="STEP_SHARE", parts={str(k): b"" for k in range(count)})  # type: ignore[arg-type]  # see address
            assert refused(partial(eve.stub.Exchange, parts, timeout=60))[0] is said
        assert eve.peak_mib() < before_mib + 64
        eve.leave()

        assert over([ann, ben], assignment) == expected


@pytest.mark.e2e
def test_malformed_messages_get_a_status_and_nothing_else(tmp_path: Path, expected: bytes) -> None:
    """C10: garbled bytes and twisted fields on every call."""
    rng = random.Random(int(os.environ.get("FEDLOOM_SEED", "0")))
    with opened(tmp_path) as ((ann, ben, eve), assignment):
        address = {"run": eve.run, "epoch": eve.epoch, "client": "eve"}
        sound: dict[str, Message] = {
            "Join": pb.JoinRequest(client="eve", protocol=1),
            "Fetch": pb.FetchRequest(**address, digest=assignment.broadcast_digest),  # type: ignore[arg-type]
            "Exchange": pb.ExchangeRequest(**address, round=0, step="STEP_ADVERTISE", parts={"": b"k"}),  # type: ignore[arg-type]
            "Heartbeat": pb.HeartbeatRequest(**address),  # type: ignore[arg-type]
            "Submit": pb.SubmitRequest(header=header_to_wire(update("eve", assignment)[0], eve.run, eve.epoch)),
        }
        seen = set()
        for name, message in sound.items():
            call = eve.channel.stream_stream(f"/fedloom.v1.Federation/{name}", None, None)  # what a unary call is too
            for _ in range(60):
                content = twisted(message, rng) if rng.random() < 0.7 else garbled(message.SerializeToString(), rng)
                try:
                    list(call(iter([content]), timeout=60))
                except grpc.RpcError as error:
                    seen.add((error.code(), error.details()))
        assert {code for code, _ in seen} <= ALLOWED, seen
        assert len(seen) >= 10, "everything is refused for the same few reasons"
        eve.join()
        eve.leave()

        assert over([ann, ben], assignment) == expected
