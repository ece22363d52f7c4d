"""What must hold of the fields of a message from a peer, as types that a message's declaration names.

A name, number or digest that no honest peer would send is a `ProtocolError`. Whether a message fits the
state of the run (right round, right client, right length) is for the coordinator and the client to say.
"""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError, ValidationInfo

from fedloom.core.codecs import installed
from fedloom.core.config.parsing import explain
from fedloom.core.config.run import Spec, TrainSection
from fedloom.core.errors import ProtocolError
from fedloom.core.limits import MAX_NAME_LENGTH, MAX_PAYLOAD_BYTES, MAX_RANK, MAX_ROUNDS, MAX_TENSORS
from fedloom.core.schema import Schema
from fedloom.core.secagg.keys import ADVERT_BYTES
from fedloom.core.secagg.steps import MASKED, Step

__all__ = [
    "LOCAL_NAMES",
    "MAX_RETRY_S",
    "STRICT",
    "Codec",
    "Digest",
    "Epoch",
    "Figures",
    "HeldDigest",
    "LocalValues",
    "Natural",
    "OldestRound",
    "Parts",
    "Rank",
    "RetryAfter",
    "Round",
    "SchemaDigest",
    "SchemaText",
    "Size",
    "SpecText",
    "StepNumber",
    "Trained",
    "Turns",
    "UploadCodec",
    "Words",
    "overridden",
]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""How every message is read: no strangers, no number for a bool or the other way round, no NaN."""

LOCAL_NAMES = frozenset({"learning_rate", "momentum", "proximal_mu"})
"""Local hyper-parameters an assignment may change. Nothing that the privacy account depends on is here."""

MAX_RETRY_S = 3600.0
"""Longest time that a client is told to stay away."""

_ANY_RUN = TrainSection(steps=1, sampling_rate=1.0, learning_rate=1.0)
"""A [train] to check overrides against before it is known which run they are for."""

_MOST_FIGURES, _LARGEST_FIGURE, _MAX_PARTS = 5, 1e12, 1000

_Selection = TypeVar("_Selection", frozenset[str], tuple[str, ...])

_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


def overridden(train: TrainSection, local: Mapping[str, float]) -> TrainSection:
    """[train] with what an assignment overrides for its round, in the ranges that hold for every [train].

    Raises:
        ProtocolError: A name is not among `LOCAL_NAMES`, or its value is none that a run file may have.
    """
    extra = sorted(local.keys() - LOCAL_NAMES)
    if extra:
        shown = ", ".join(name[:64] for name in extra[:3])
        raise ProtocolError(
            f"the coordinator tries to set {shown} for one round; only {', '.join(sorted(LOCAL_NAMES))} may vary"
        )
    try:
        return TrainSection.model_validate({**train.model_dump(), **local})
    except ValidationError as error:
        name = str(error.errors(include_url=False)[0]["loc"][0])
        raise ProtocolError(
            f"the coordinator sets {name} to {local[name]!r} for one round; {explain(error, TrainSection)}"
        ) from error


def _epoch(epoch: int, info: ValidationInfo) -> int:
    run = info.data.get("run", "")
    if not 0 < len(run) <= MAX_NAME_LENGTH or not run.isprintable() or epoch < 1:
        raise ProtocolError(f"join reply names run {run[:64]!r}, epoch {epoch}; both are needed, the name printable")
    return epoch


def _schema_digest(digest: str, info: ValidationInfo) -> str:
    schema = info.data.get("schema")
    if schema is not None and schema.digest != digest:
        raise ProtocolError(
            f"the schema received has digest {schema.digest[:12]}, the coordinator says {digest[:12]!r}; "
            "both sides must run compatible versions of fedloom"
        )
    return digest


def _oldest(oldest: int, info: ValidationInfo) -> int:
    if oldest > (now := info.data.get("round", oldest)):
        raise ProtocolError(f"updates are taken from round {oldest} on, but round {now} is open or next")
    return oldest


def _digest(text: str, info: ValidationInfo) -> str:
    if not _DIGEST.fullmatch(text):
        what = str(info.field_name).replace("_", " ")
        raise ProtocolError(f"{what} {text[:64]!r} is not 64 lower-case hexadecimal digits")
    return text


def _held_digest(text: str, info: ValidationInfo) -> str:
    return text and _digest(text, info)


def _size(size_bytes: int) -> int:
    if not 0 <= size_bytes <= MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"payload of {size_bytes} bytes announced; at most {MAX_PAYLOAD_BYTES} are allowed")
    return size_bytes


def _wait(retry_after_s: float) -> float:
    if not 0 <= retry_after_s <= MAX_RETRY_S:
        raise ProtocolError(f"wait of {retry_after_s} s; 0 to {MAX_RETRY_S:g} s allowed")
    return retry_after_s


def _score(figures: tuple[float, ...]) -> tuple[float, ...]:
    """The figures of an evaluation: sums over at most as many rows as anybody may declare."""
    if len(figures) > _MOST_FIGURES or not all(abs(each) <= _LARGEST_FIGURE for each in figures):
        raise ProtocolError(
            f"update with {len(figures)} figures of an evaluation; at most {_MOST_FIGURES}, each from "
            f"-{_LARGEST_FIGURE:g} to {_LARGEST_FIGURE:g}, are allowed"
        )
    return figures


def _codec(name: str) -> str:
    return installed(name[:MAX_NAME_LENGTH])


def _upload_codec(name: str) -> str:
    """The name of a codec, or of a masked update, which no codec can read."""
    return name if name == MASKED else _codec(name)


def _words(found: _Selection) -> _Selection:
    """Roles and names of tensors. Whether the adapter has them is for whoever has its schema to say."""
    if len(found) > MAX_TENSORS or any(not 0 < len(word) <= MAX_NAME_LENGTH for word in found):
        raise ProtocolError(
            f"a selection of {len(found)} roles and tensors; at most {MAX_TENSORS}, each of 1 to {MAX_NAME_LENGTH} "
            "characters, are allowed"
        )
    return found


def _trained(train: frozenset[str]) -> frozenset[str]:
    if not train:
        raise ProtocolError("assignment trains nothing; it must name roles or tensors")
    return train


def _local(values: Mapping[str, float]) -> Mapping[str, float]:
    overridden(_ANY_RUN, values)
    return values


def _step(number: Any) -> Step:
    try:
        return Step(number)
    except ValueError:
        raise ProtocolError(f"step {number} of a secure sum; 1 to {max(Step)} are known") from None


def _parts(parts: Mapping[str, bytes]) -> Mapping[str, bytes]:
    if len(parts) > _MAX_PARTS or any(
        len(name) > MAX_NAME_LENGTH or len(part) > ADVERT_BYTES for name, part in parts.items()
    ):
        raise ProtocolError(
            f"a step of a secure sum with {len(parts)} parts; at most {_MAX_PARTS} of {ADVERT_BYTES} bytes are allowed"
        )
    return parts


def _document(parse: Callable[[str], object]) -> PlainValidator:
    """A JSON document inside a message, which is a text there."""

    def parsed(text: Any) -> object:
        if not isinstance(text, str):
            raise ValueError("Input should be a JSON document as a string")
        return parse(text)

    return PlainValidator(parsed)


_Real = Annotated[float, Field(allow_inf_nan=True)]
"""A float whose own check says what is wrong with NaN."""

Natural = Annotated[int, Field(ge=0, lt=2**63)]
Round = Annotated[Natural, Field(lt=MAX_ROUNDS)]
Epoch = Annotated[Natural, AfterValidator(_epoch)]
"""The coordinator's, of a run that the field before it names."""
OldestRound = Annotated[Natural, AfterValidator(_oldest)]
Rank = Annotated[
    Annotated[int, Field(ge=0, le=MAX_RANK)] | None,
    AfterValidator(lambda rank: rank or None),
    PlainSerializer(lambda rank: rank or 0),
]
"""A rank to work at; the schema's is None here, and 0 in a message."""
Size = Annotated[int, AfterValidator(_size)]
"""A payload's length in bytes."""
Digest = Annotated[str, AfterValidator(_digest)]
"""A SHA-256 in lower-case hexadecimal digits."""
HeldDigest = Annotated[str, AfterValidator(_held_digest)]
"""A digest, or nothing."""
SchemaDigest = Annotated[str, Field(validate_default=True), AfterValidator(_schema_digest)]
"""That of the schema in the same message."""
Codec = Annotated[str, AfterValidator(_codec)]
UploadCodec = Annotated[str, AfterValidator(_upload_codec)]
Words = Annotated[frozenset[str], AfterValidator(_words), PlainSerializer(sorted)]
"""Roles and names of tensors, see `Schema.select`; sorted in a message."""
Trained = Annotated[Words, AfterValidator(_trained)]
Turns = Annotated[tuple[str, ...], AfterValidator(_words)]
"""Roles and names of tensors in an order."""
LocalValues = Annotated[Mapping[str, float], AfterValidator(_local)]
Figures = Annotated[tuple[_Real, ...], AfterValidator(_score)]
RetryAfter = Annotated[_Real, AfterValidator(_wait)]
StepNumber = Annotated[Step, PlainValidator(_step)]
Parts = Annotated[Mapping[str, bytes], AfterValidator(_parts)]
SpecText = Annotated[Spec, _document(Spec.from_json), PlainSerializer(lambda spec: spec.model_dump_json())]
SchemaText = Annotated[Schema, _document(Schema.from_json), PlainSerializer(lambda schema: schema.to_json())]
