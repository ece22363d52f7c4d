"""Whether an update may be taken: its header before a byte is read, its values before they count."""

import hashlib
import math
from dataclasses import replace

import numpy as np

from fedloom.core.codecs import codec
from fedloom.core.config.run import Spec
from fedloom.core.errors import CodecError, Overloaded, ProtocolError, SchemaError, UpdateRejected
from fedloom.core.runtime.failpoints import failpoint
from fedloom.core.schema import Schema, Tensors
from fedloom.core.secagg.steps import MASKED
from fedloom.proto.messages import Assignment, UpdateHeader
from fedloom.server.rounds.state import Rounds, UpdateAccepted
from fedloom.server.strategy_errors import check_update
from fedloom.strategies.api import State, Strategy, Update
from fedloom.strategies.transforms.average import check

__all__ = [
    "check_address",
    "check_payload",
    "check_result_score",
    "check_score",
    "decoded",
    "expected_bytes",
    "is_repeat",
]

_COMMITTING_S = 0.5
"""When to come back to a coordinator that commits."""


def is_repeat(header: UpdateHeader, accepted: UpdateAccepted | None) -> bool:
    """Whether exactly this update was accepted before, given what was accepted under its round and client.

    Raises:
        ProtocolError: Another update was.
    """
    if accepted is not None and accepted.digest != header.digest:
        raise ProtocolError(
            f"client {header.client!r} has already sent another update for round {header.round + 1}; "
            "only the very same bytes may be sent again"
        )
    return accepted is not None


def check_address(header: UpdateHeader, rounds: Rounds) -> None:
    """Refuse an update that is not for the open round, or not from one of its cohort.

    Raises:
        ProtocolError: It is late, early, or nobody asked for it.
        Overloaded: It will count in the next buffered round, once the one that is being committed is over.
        UpdateRejected: This client's update was refused in this round before.
    """
    client, is_open = header.client, rounds.phase == "open"
    known = rounds.starts.get(client) == header.round  # only in buffered rounds: made for this or an earlier one
    if known and rounds.phase == "closed" and header.round >= rounds.oldest:
        raise Overloaded(f"round {rounds.round + 1} is being committed; send the update again soon", _COMMITTING_S)
    if not is_open or not (header.round == rounds.round or known):
        whose = f"update of client {client!r} is for round {header.round + 1}"
        if header.round < rounds.next:
            limit = "" if rounds.max_staleness is None else f" or more than {rounds.max_staleness} rounds ago"
            raise ProtocolError(f"{whose}, which was closed without it{limit}; drop it and ask for work")
        raise ProtocolError(
            f"{whose}, but round {rounds.next + 1} is {'open' if is_open else 'next and not open'}; "
            "drop it and ask for work"
        )
    if client not in rounds.cohort or (rounds.starts and not known):
        raise ProtocolError(f"client {client!r} was not asked to train in round {header.round + 1}; ask for work")
    if rounds.lost.get(client) == "rejected":
        raise UpdateRejected(f"the update of client {client!r} for round {header.round + 1} was refused before")


def check_score(header: UpdateHeader, spec: Spec) -> None:
    """Refuse figures that nobody has asked for. A client that trains a round anew has none.

    Raises:
        ProtocolError: There are more or fewer than an evaluation gives, or the round has none.
    """
    section = spec.federated_evaluation
    wanted = section.figures if section.due(header.round) else 0
    if len(header.score) not in (0, wanted):
        raise ProtocolError(
            f"client {header.client!r} sends {len(header.score)} figures of an evaluation for round "
            f"{header.round + 1}; {wanted} or none are allowed"
        )


def check_result_score(client: str, score: tuple[float, ...], spec: Spec, finished: bool) -> None:
    """Refuse figures on a run's result that nobody has asked for.

    Raises:
        ProtocolError: The run is not over or has no evaluations, or there are more or fewer than one gives.
    """
    wanted = 3 if finished and spec.federated_evaluation.enabled else 0
    if len(score) != wanted or not all(map(math.isfinite, score)):
        raise ProtocolError(
            f"client {client!r} sends {len(score)} figures on a result; {wanted} finite ones are allowed"
        )


def expected_bytes(header: UpdateHeader, wanted: str, upload: Schema, masked_bytes: int) -> int:
    """The payload's exact length, from the codec and the schema that the client was asked for.

    Args:
        header: What precedes it.
        wanted: The codec that it must have.
        upload: Its schema.
        masked_bytes: Its length where it is masked.

    Raises:
        ProtocolError: Schema, codec or announced length differ from that.
    """
    if header.schema_digest != upload.digest:
        raise ProtocolError(
            f"client {header.client!r} sends schema {header.schema_digest[:12]}, it was asked for "
            f"{upload.digest[:12]}; send exactly the trained roles at the assigned rank"
        )
    if header.codec != wanted:
        raise ProtocolError(f"client {header.client!r} sends codec {header.codec[:32]!r}; this run takes {wanted!r}")
    size_bytes = masked_bytes if wanted == MASKED else codec(wanted).encoded_size(upload)
    if header.payload_bytes != size_bytes:
        raise ProtocolError(
            f"client {header.client!r} announces {header.payload_bytes} bytes; the schema in {wanted} is {size_bytes}"
        )
    return size_bytes


@failpoint("submission.check")
def check_payload(header: UpdateHeader, payload: bytes, size_bytes: int) -> None:
    """Refuse a payload that is not the announced one.

    Raises:
        ProtocolError: It has another length than `size_bytes`, or another digest than its header says.
    """
    if len(payload) != size_bytes:
        raise ProtocolError(f"update of {len(payload)} bytes; its header and the schema say {size_bytes}")
    if hashlib.sha256(payload).hexdigest() != header.digest:
        raise ProtocolError("the update's bytes do not have the digest in its header; send it again")


@failpoint("submission.decode")
def decoded(
    name: str,
    strategy: Strategy,
    state: State,
    assignment: Assignment,
    upload: Schema,
    payload: bytes,
    update: Update,
    max_norm: float,
) -> Update:
    """The update with the payload's values, once it is sure that they may be folded.

    Args:
        name: The strategy's, as the run file names it.
        strategy: Refuses what it cannot fold, see `Strategy.check`.
        state: Its state in the round that the update would count in.
        assignment: What the client was asked to do.
        upload: The schema of the answer.
        payload: The encoded change, of the right length.
        update: Client, weight and start; the payload's values take the place of its `delta`.
        max_norm: Bound on the L2 norm over all tensors.

    Raises:
        UpdateRejected: The weight is not usable, or the values are not finite, do not decode, are beyond a bound, lead
            where the codec of broadcasts cannot follow, or the strategy refuses them.
        StrategyError: The strategy fails on them.
    """
    try:
        delta = codec(assignment.upload_codec).decode(upload, payload)
        update = replace(update, delta=delta)
        _check_size(update, max_norm)
        check(upload, update)
        _check_sendable(codec(assignment.broadcast_codec).largest, state.adapter, update)
    except (CodecError, SchemaError) as error:
        raise UpdateRejected(str(error)) from error
    check_update(name, strategy, state, update)
    return update


def _check_size(update: Update, max_norm: float) -> None:
    squares = 0.0
    for name, tensor in update.delta.items():
        # A square sum is finite only if every value is; it overflows for some that are, which then are looked at.
        square = float(np.vdot(tensor, tensor))
        squares += square
        if not math.isfinite(square) and not np.isfinite(tensor).all():
            raise UpdateRejected(
                f"update of client {update.client!r} holds NaN or Inf in {name!r}; "
                "the round goes on without it, lower the learning rate"
            )
    # The sums above are float32's; near the bound and beyond it they are made anew.
    if not math.sqrt(squares) <= 0.99 * max_norm and not (norm := _norm(update.delta)) <= max_norm:
        raise UpdateRejected(
            f"update of client {update.client!r} has L2 norm {norm:.4g}; rounds.max_update_norm = {max_norm:g} "
            "is allowed, which the run file sets or the run's rates, steps and noise give; lower the learning rate or "
            "the number of steps"
        )


def _check_sendable(largest: float, adapter: Tensors, update: Update) -> None:
    """Refuse an update that alone would move a value beyond what the codec of broadcasts carries.

    A mean, a median or another choice between updates that pass is not beyond it either.
    """
    if largest >= float(np.finfo(np.float32).max):
        return
    for name, delta in update.delta.items():
        before = adapter[name][tuple(slice(0, size) for size in delta.shape)]
        if not np.abs(before + delta).max() <= largest:
            raise UpdateRejected(
                f"update of client {update.client!r} moves {name!r} beyond {largest:g}, the most that wire.broadcast "
                "of this run carries; the round goes on without it, lower the learning rate"
            )


def _norm(delta: Tensors) -> float:
    """L2 norm over all tensors, in float64: no float32 overflows its square there."""
    return math.sqrt(sum(float(np.square(each, dtype=np.float64).sum()) for each in delta.values()))
