from collections.abc import Callable
from dataclasses import replace

import pytest

from fedloom.core import errors
from fedloom.core.config.run import Spec
from fedloom.core.errors import CodecError, FedloomError, ProtocolError, SchemaError
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.core.secagg.steps import MASKED, Step
from fedloom.proto.messages import (
    Answer,
    Assignment,
    Finished,
    Joined,
    RoundStatus,
    StepMessage,
    StepResult,
    UpdateHeader,
    Wait,
)
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.wire import (
    STATUS,
    answer_from_wire,
    answer_to_wire,
    from_wire,
    header_from_wire,
    header_to_wire,
    result_from_wire,
    result_to_wire,
    to_wire,
)

DIGEST = "ab" * 32
SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (2, 3)), TensorSpec("m.B", "m", Role.LORA_B, (4, 2))), 2.0)
SPEC = Spec.model_validate(
    {
        "run": {"name": "trial", "rounds": 3},
        "model": {"base": "tiny", "labels": ["no", "yes"]},
        "train": {"steps": 5, "sampling_rate": 0.1, "learning_rate": 0.5},
    }
)
ASSIGNMENT = Assignment(
    round=7,
    train=frozenset({Role.LORA_B, Role.HEAD}),
    broadcast_roles=frozenset({Role.LORA_A, Role.LORA_B, Role.BASE_A, Role.BASE_B}),
    broadcast_digest=DIGEST,
    broadcast_bytes=1234,
    broadcast_codec="fp16",
    upload_codec="fp32",
    personal=frozenset({Role.HEAD}),
    rank=2,
    base_rank=16,
    local={"learning_rate": 0.25},
    linear=frozenset({Role.LORA_B}),
)
HEADER = UpdateHeader("ward-3", 7, DIGEST, "fp16", 24, "cd" * 32)


@pytest.mark.parametrize(
    "answer",
    [
        ASSIGNMENT,
        replace(ASSIGNMENT, rank=None, local={}),
        replace(ASSIGNMENT, turns=(Role.LORA_B, Role.HEAD, Role.LORA_B)),
        Wait(1.5),
        Finished(9, "fp32", DIGEST, 56),
    ],
)
def test_an_answer_survives_the_wire(answer: Answer) -> None:
    sent = answer_to_wire(answer).SerializeToString()

    assert answer_from_wire(pb.WorkReply.FromString(sent)) == answer


def test_a_masked_update_is_addressed_to_its_attempt() -> None:
    masked = replace(HEADER, codec=MASKED, attempt=3)

    assert header_from_wire(header_to_wire(masked, "4f", 3))[0] == masked
    assert answer_from_wire(answer_to_wire(replace(ASSIGNMENT, upload_codec=MASKED))).upload_codec == MASKED  # type: ignore[union-attr]
    with pytest.raises(CodecError):
        answer_from_wire(spoilt_assignment(broadcast_codec=MASKED))


@pytest.mark.parametrize("step", list(Step))
def test_a_step_and_its_result_survive_the_wire(step: Step) -> None:
    message = StepMessage(7, step, {"": b"abc", "ann": b""}, 2)
    sent = to_wire(pb.ExchangeRequest, message, client="ben", run="4f", epoch=3)

    assert from_wire(StepMessage, pb.ExchangeRequest.FromString(sent.SerializeToString())) == message
    assert (sent.client, sent.run, sent.epoch) == ("ben", "4f", 3)
    for result in (StepResult(2, {"ann": b"abc"}), StepResult(2, {}), None):
        reply = result_to_wire(result).SerializeToString()
        assert result_from_wire(pb.ExchangeReply.FromString(reply)) == result


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (pb.ExchangeRequest(), "step 0"),
        (pb.ExchangeRequest(step=6), "step 6"),  # type: ignore[arg-type]  # no step of this build
        (pb.ExchangeRequest(step="STEP_SHARE", parts={"a": bytes(161)}), "at most 1000 of 160 bytes"),
        (pb.ExchangeRequest(step="STEP_SHARE", parts={str(i): b"" for i in range(1001)}), "1001 parts"),
        (pb.ExchangeRequest(step="STEP_SHARE", parts={"a" * 257: b""}), "1 parts"),
    ],
)
def test_a_step_no_honest_peer_sends_is_refused(request_: pb.ExchangeRequest, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        from_wire(StepMessage, request_)


def test_a_result_no_honest_coordinator_sends_is_refused() -> None:
    with pytest.raises(ProtocolError, match="1001 parts"):
        result_from_wire(pb.ExchangeReply(attempt=1, parts={str(i): b"" for i in range(1001)}))


def spoilt_assignment(**changes: object) -> pb.WorkReply:
    message = answer_to_wire(ASSIGNMENT)
    for name, value in changes.items():
        if isinstance(value, list):
            del getattr(message.assignment, name)[:]
            getattr(message.assignment, name).extend(value)
        else:
            setattr(message.assignment, name, value)
    return message


@pytest.mark.parametrize(
    ("message", "error", "text"),
    [
        (spoilt_assignment(train=["x" * 257]), ProtocolError, "a selection of"),
        (spoilt_assignment(train=[]), ProtocolError, "trains nothing"),
        (spoilt_assignment(train=["lora_B"], personal=[""]), ProtocolError, "a selection of"),
        (spoilt_assignment(broadcast_roles=[str(each) for each in range(100_000)]), ProtocolError, "a selection of"),
        (spoilt_assignment(turns=[str(each) for each in range(100_000)]), ProtocolError, "a selection of"),
        (spoilt_assignment(turns=["lora_B", ""]), ProtocolError, "a selection of"),
        (spoilt_assignment(broadcast_digest="../../etc/passwd"), ProtocolError, "64 lower-case"),
        (spoilt_assignment(broadcast_digest=DIGEST + "\n"), ProtocolError, "64 lower-case"),
        (spoilt_assignment(broadcast_bytes=1 << 40), ProtocolError, "at most"),
        (spoilt_assignment(broadcast_codec="pickle"), CodecError, "unknown codec"),
        (spoilt_assignment(upload_codec="pickle"), CodecError, "unknown codec"),
        (pb.WorkReply(), ProtocolError, "no answer"),
        (pb.WorkReply(wait=pb.Wait(retry_after_s=float("nan"))), ProtocolError, "wait of nan"),
        (pb.WorkReply(wait=pb.Wait(retry_after_s=-1)), ProtocolError, "wait of -1"),
        (pb.WorkReply(wait=pb.Wait(retry_after_s=1e9)), ProtocolError, "wait of 1000000000"),
        (pb.WorkReply(finished=pb.Finished(rounds=1, codec="fp32", digest="")), ProtocolError, "64 lower-case"),
    ],
)
def test_an_answer_no_honest_coordinator_sends_is_refused(
    message: pb.WorkReply, error: type[FedloomError], text: str
) -> None:
    with pytest.raises(error, match=text):
        answer_from_wire(message)


def test_how_the_run_stands_survives_and_must_make_sense() -> None:
    for standing in (RoundStatus(7, True, 3), RoundStatus(7, False, 7), RoundStatus(0, True, 0)):
        assert from_wire(RoundStatus, to_wire(pb.HeartbeatReply, standing)) == standing
    with pytest.raises(ProtocolError, match="taken from round 8 on, but round 7 is open or next"):
        from_wire(RoundStatus, pb.HeartbeatReply(round=7, open=True, oldest=8))


@pytest.mark.parametrize(
    ("name", "value"),
    [("noise_multiplier", 0.0), ("clip_norm", 9.0), ("learning_rate", float("inf")), ("learning_rate", -1.0)],
)
def test_an_assignment_cannot_change_anything_private(name: str, value: float) -> None:
    message = answer_to_wire(ASSIGNMENT)
    message.assignment.local[name] = value

    with pytest.raises(ProtocolError, match=name):
        answer_from_wire(message)


def test_a_schema_with_another_digest_is_refused() -> None:
    reply = to_wire(pb.JoinReply, Joined(run="4f", epoch=3, spec=SPEC, schema=SCHEMA))
    reply.schema_digest = DIGEST

    with pytest.raises(ProtocolError, match="digest"):
        from_wire(Joined, reply)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda reply: reply.ClearField("run"), ProtocolError),
        (lambda reply: reply.ClearField("epoch"), ProtocolError),
        (lambda reply: reply.ClearField("spec"), errors.ConfigError),
        (lambda reply: reply.ClearField("schema"), SchemaError),
    ],
)
def test_an_incomplete_join_reply_is_refused(spoil: Callable[[pb.JoinReply], None], error: type[FedloomError]) -> None:
    reply = to_wire(pb.JoinReply, Joined(run="4f", epoch=3, spec=SPEC, schema=SCHEMA))
    spoil(reply)

    with pytest.raises(error):
        from_wire(Joined, reply)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("digest", "CD" * 32, ProtocolError),
        ("schema_digest", "", ProtocolError),
        ("payload_bytes", (4 << 30) + 1, ProtocolError),
        ("codec", "zip" * 1000, CodecError),
    ],
)
def test_a_header_no_honest_client_sends_is_refused(field: str, value: object, error: type[FedloomError]) -> None:
    message = header_to_wire(HEADER, "4f", 3)
    setattr(message, field, value)

    with pytest.raises(error):
        header_from_wire(message)


def test_every_error_has_a_status() -> None:
    kinds = {getattr(errors, name) for name in errors.__all__}

    assert kinds == STATUS.keys()
