"""Between tensors and payloads: what a client reads of a broadcast, and what it makes of a round's work."""

import hashlib
from collections.abc import Callable

from fedloom.client.policy import Policy
from fedloom.client.session.api import Trained, within
from fedloom.client.session.outbox import OutboxEntry
from fedloom.client.session.terms import terms_of
from fedloom.core.codecs import codec
from fedloom.core.errors import ProtocolError
from fedloom.core.schema import Array, Schema
from fedloom.proto.messages import Assignment, Joined, UpdateHeader, upload_schema

__all__ = ["packed", "reader"]


def reader(name: str, schema: Schema, size_bytes: int, what: str) -> Callable[[bytes], dict[str, Array]]:
    """What decodes a payload of `size_bytes`, once it is sure that the schema gives that many.

    Args:
        name: The codec's name.
        schema: What is in the payload.
        size_bytes: Its announced length.
        what: What it is, for people.

    Raises:
        CodecError: There is no such codec.
        ProtocolError: Under the schema it would have another length.
    """
    incoming = codec(name)
    if incoming.encoded_size(schema) != size_bytes:
        raise ProtocolError(
            f"{what} of {size_bytes} bytes; {incoming.name} under the schema needs {incoming.encoded_size(schema)}"
        )
    return lambda payload: incoming.decode(schema, payload)


def packed(policy: Policy, joined: Joined, assignment: Assignment, trained: Trained) -> OutboxEntry:
    """The update that answers an assignment, as it must be sent.

    Args:
        policy: The site's policy.
        joined: The run.
        assignment: What was asked.
        trained: What the work has left.

    Raises:
        CodecError: A value is NaN.
    """
    secure = joined.spec.secure_aggregation
    outgoing = secure.fixed_point if secure.enabled else codec(assignment.upload_codec)
    schema = upload_schema(joined.schema, assignment)
    body = outgoing.encode(schema, within(outgoing.largest, trained.delta))
    about = assignment.round, schema.digest, assignment.upload_codec, len(body), hashlib.sha256(body).hexdigest()
    header = UpdateHeader(policy.client.name, *about, score=trained.score)
    return OutboxEntry(joined.run, trained.charge, header, body, terms_of(policy, joined))
