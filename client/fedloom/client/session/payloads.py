"""Between tensors and payloads: what a client reads of a broadcast, and what it makes of a round's work."""

import hashlib
from collections.abc import Callable

from fedloom.client.policy import Policy
from fedloom.client.session.api import Trained, within
from fedloom.client.session.left_out import LeftOut
from fedloom.client.session.outbox import OutboxEntry
from fedloom.client.session.terms import terms_of
from fedloom.core.codecs import codec
from fedloom.core.codecs.api import seed_of
from fedloom.core.errors import ProtocolError
from fedloom.core.schema import Array, Schema, Tensors
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


def packed(policy: Policy, joined: Joined, assignment: Assignment, trained: Trained, left_out: LeftOut) -> OutboxEntry:
    """The update that answers an assignment, as it must be sent.

    Args:
        policy: The site's policy.
        joined: The run.
        assignment: What was asked.
        trained: What the work has left.
        left_out: What the codec has left out of earlier updates, if it is one with feedback.

    Raises:
        CodecError: A value is NaN.
        LedgerError: What it leaves out now cannot be kept.
    """
    secure = joined.spec.secure_aggregation
    schema, name = upload_schema(joined.schema, assignment), policy.client.name
    if secure.enabled:
        integers, place = secure.integers, (joined.spec.run.seed, assignment.round)
        body = integers.encode(schema, within(integers.largest, trained.delta), seed_of(*place), seed_of(*place, name))
    else:
        body = _encoded(joined, assignment, trained.delta, schema, left_out)
    about = assignment.round, schema.digest, assignment.upload_codec, len(body), hashlib.sha256(body).hexdigest()
    header = UpdateHeader(name, *about, score=trained.score)
    return OutboxEntry(joined.run, trained.charge, header, body, terms_of(policy, joined))


def _encoded(joined: Joined, assignment: Assignment, delta: Tensors, schema: Schema, left_out: LeftOut) -> bytes:
    """The change, and what is to go with it, under the codec that is asked for."""
    outgoing, round = codec(assignment.upload_codec), assignment.round
    seed = seed_of(joined.spec.run.seed, round, left_out.client)
    if not outgoing.traits.feedback:
        return outgoing.encode(schema, within(outgoing.largest, delta), seed)
    before = left_out.before(joined.run, round, schema)
    whole = within(outgoing.largest, {name: each + before[name] for name, each in delta.items()})
    body = outgoing.encode(schema, whole, seed)
    sent = outgoing.decode(schema, body)
    left_out.keep(joined.run, round, before, {name: each - sent[name] for name, each in whole.items()})
    return body
