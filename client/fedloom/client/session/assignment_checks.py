"""What a coordinator may ask of one round. All of it is looked at before anything is fetched, charged or trained.

Whatever is refused here ends the client, uncharged: an honest coordinator asks for nothing of the kind.
"""

from dataclasses import replace

import numpy as np

from fedloom.client.component_policy import component_problems
from fedloom.client.policy import Policy
from fedloom.core.codecs import codec, installed
from fedloom.core.config.run import Spec, TrainSection
from fedloom.core.errors import PolicyError, ProtocolError
from fedloom.core.schema import Array, Role, Schema, Tensors
from fedloom.core.secagg.steps import MASKED
from fedloom.proto.checks import overridden
from fedloom.proto.messages import Assignment, Finished, broadcast_schema, moving

__all__ = ["check_broadcast", "check_order", "final_schema"]


def check_order(policy: Policy, spec: Spec, schema: Schema, assignment: Assignment) -> TrainSection:
    """Refuse an assignment that is beyond the run or the policy.

    Args:
        policy: The site's policy.
        spec: The run, already checked against it.
        schema: The run's schema, as the base model here gives it.
        assignment: What is asked.

    Returns:
        [train] with what the assignment overrides for this round.

    Raises:
        ProtocolError: It trains or keeps what this adapter has not, or keeps what it does not train, or gives a turn to
            what it does not train.
        CodecError: A codec is not installed here.
        PolicyError: The round is none of the run, a codec is not allowed here, a rank does not fit the adapter, the
            broadcast would not fit into compute.memory_mib, or an override is out of range. Nothing was fetched or
            charged.
    """
    last = min(spec.run.rounds, policy.limits.max_rounds)
    if not 0 <= assignment.round < last:
        raise PolicyError(
            f"the coordinator asks for round {assignment.round + 1} of a run of {spec.run.rounds}; rounds 1 to {last} "
            "are allowed here (run.rounds, and limits.max_rounds of the policy)"
        )
    _check_selections(schema, assignment)
    if assignment.turns and spec.privacy.noise_bands > 1:
        raise PolicyError(
            f"the coordinator lets tensors take turns in a run with privacy.noise_bands = {spec.privacy.noise_bands}, "
            "whose noise is correlated between steps of the same tensors; nothing was charged"
        )
    _check_codecs(policy, assignment)
    _check_ranks(policy, schema, assignment)
    _check_memory(policy, schema, assignment)
    try:
        train = overridden(spec.train, assignment.local)
    except ProtocolError as error:
        raise PolicyError(str(error)) from error
    if train.learning_rate > policy.limits.max_learning_rate:
        raise PolicyError(
            f"the coordinator sets learning_rate to {train.learning_rate:g} for one round; at most "
            f"{policy.limits.max_learning_rate:g} is allowed (limits.max_learning_rate of the policy)"
        )
    return train


def final_schema(policy: Policy, schema: Schema, finished: Finished) -> Schema:
    """The schema of the adapter that a run ends with.

    Raises:
        PolicyError: Its correction does not fit the adapter, or it would not fit into compute.memory_mib.
    """
    rank = finished.base_rank
    roles = (schema.with_base(1) if rank else schema).roles
    asked = Assignment(finished.rounds, frozenset(), roles, finished.digest, finished.bytes, finished.codec)
    asked = replace(asked, base_rank=rank)
    _check_codecs(policy, asked)
    _check_ranks(policy, schema, asked)
    _check_memory(policy, schema, asked)
    return broadcast_schema(schema, asked)


def check_broadcast(policy: Policy, schema: Schema, tensors: Tensors) -> None:
    """Refuse an adapter, or terms for its gradients, with values that no training comes to.

    Each value is bounded, and so is each entry of what a pair and a correction add to a frozen weight: an entry of
    scale·B·A is at most scale times the longest row of B times the longest column of A. Both bounds are far above what
    is trained and far below what float32 holds, so nothing that is computed from such an adapter overflows by itself.

    Args:
        policy: The site's policy.
        schema: The run's schema, whose scale and pairs count.
        tensors: The broadcast as decoded.

    Raises:
        PolicyError: A value is NaN or infinite, or one is beyond limits.max_weight. Nothing was charged.
    """
    most = policy.limits.max_weight
    for name, tensor in tensors.items():
        largest = float(max(tensor.max(), -tensor.min()))
        if not largest <= most:  # also where it is NaN
            of, _, term = name.rpartition(".")
            what = f"the term for the gradient of {of[:64]!r}" if term == Role.LINEAR else f"{name[:64]!r}"
            raise _beyond(f"{what} has a value of {largest:g}", most)
    for pair in schema.pairs:
        for a, b in ((pair.a, pair.b), (f"{pair.module}.base_A", f"{pair.module}.base_B")):
            if a in tensors and b in tensors:
                added = schema.scale * _longest(tensors[b], 1) * _longest(tensors[a], 0)
                if not added <= most:
                    raise _beyond(f"{b[:64]!r} times {a[:64]!r} may add {added:g} to a frozen weight", most)


def _beyond(what: str, most: float) -> PolicyError:
    return PolicyError(
        f"the coordinator's adapter is refused: {what}; finite values up to {most:g} are allowed (limits.max_weight of "
        "the policy). Nothing was charged. Ask the coordinator's operator what happened, and raise the limit only for "
        "a run that is known to need it"
    )


def _longest(matrix: Array, axis: int) -> float:
    return float(np.linalg.norm(matrix, axis=axis).max())


def _check_selections(schema: Schema, assignment: Assignment) -> None:
    trained, kept = schema.select(assignment.train), schema.select(assignment.personal)
    unknown = schema.unknown(assignment.train | assignment.personal)
    if unknown or not trained.tensors or not kept.names() <= trained.names():
        asked = ", ".join(sorted(assignment.train | assignment.personal))[:200]
        raise ProtocolError(
            f"the coordinator asks to train {asked}; this adapter has {', '.join(sorted(schema.roles))}, and only what "
            "is trained can be kept"
        )
    moving(schema, assignment.train, assignment.turns)
    added = schema.select(assignment.linear)
    if schema.unknown(assignment.linear) or not added.names() <= trained.names() - kept.names():
        raise ProtocolError(
            f"the coordinator sends terms for the gradients of {', '.join(sorted(assignment.linear))[:200]}; only what "
            "is trained and uploaded can have one"
        )


def _check_codecs(policy: Policy, assignment: Assignment) -> None:
    """Codecs that this site allows, also where they are not those that the run named."""
    asked = (assignment.broadcast_codec, assignment.upload_codec, *(link.codec for link in assignment.links))
    names = sorted({installed(name) for name in asked if name != MASKED})
    if problems := component_problems(policy.components, {"codecs": names}):
        raise PolicyError(f"the coordinator asks for {problems[0]}")


def _check_ranks(policy: Policy, schema: Schema, assignment: Assignment) -> None:
    """Ranks that the adapter has room for. A matrix has no rank above its smaller side."""
    if assignment.rank is not None and not 1 <= assignment.rank <= schema.rank:
        raise PolicyError(
            f"the coordinator asks for rank {assignment.rank}; this run's adapter allows 1 to {schema.rank}"
        )
    shapes = {spec.name: spec.shape for spec in schema.tensors}
    most = max((min(shapes[pair.a][1], shapes[pair.b][0]) for pair in schema.pairs), default=0)
    if not 0 <= assignment.base_rank <= most:
        raise PolicyError(
            f"the coordinator announces corrections of rank {assignment.base_rank}; the weights they are for allow 0 "
            f"to {most}"
        )
    if assignment.base_rank and policy.compute.quantization != "none":
        raise PolicyError(
            "this run's strategy corrects the frozen base model, which cannot be done to 4-bit weights; set "
            'compute.quantization = "none", with compute.dtype = "bfloat16" to save memory'
        )


def _check_memory(policy: Policy, schema: Schema, assignment: Assignment) -> None:
    """A broadcast that fits, as it comes and as the float32 values it is decoded to."""
    room_mib, derived = policy.compute.memory_mib, broadcast_schema(schema, assignment)
    needed = codec(assignment.broadcast_codec).encoded_size(derived) + 4 * derived.size
    if room_mib is not None and needed > room_mib << 20:
        raise PolicyError(
            f"the coordinator's adapter needs {needed >> 20} MiB (rank {assignment.rank or schema.rank}, corrections "
            f"of rank {assignment.base_rank}); compute.memory_mib = {room_mib} is what this site allows"
        )
