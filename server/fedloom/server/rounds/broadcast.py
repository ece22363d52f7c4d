"""A strategy's plans as assignments and bytes: each distinct broadcast of a round is encoded and hashed once."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedloom.core.codecs import codec
from fedloom.core.codecs.auto import AUTO, chosen
from fedloom.core.codecs.changes import held_digest
from fedloom.core.config.run import RunConfig
from fedloom.core.config.schedules import learning_rates
from fedloom.core.errors import CodecError, ConfigError, ProtocolError, SchemaError, StrategyError
from fedloom.core.runtime.failpoints import failpoint
from fedloom.core.schema import Array, Role, Schema, Tensors, linear_name
from fedloom.core.secagg.steps import MASKED
from fedloom.proto.checks import overridden
from fedloom.proto.messages import Assignment, Finished, Link, broadcast_schema, moving, upload_schema
from fedloom.server.strategy_errors import blamed
from fedloom.strategies.api import Plan, State, Strategy, Update
from fedloom.strategies.result import base_rank, result_schema
from fedloom.strategies.transforms.coded_broadcast import Step, steps

__all__ = ["FINAL_CODEC", "Broadcasts", "codecs_of", "final"]

FINAL_CODEC = "fp32"
"""Codec of the final adapter: it is what the run is for, so nothing of it is rounded away."""


_PROBED = 8
"""Values of each tensor that are looked at before all are."""


class Broadcasts:
    """The assignments and broadcast payloads of one round. Everything here is a function of its arguments alone.

    Args:
        config: The run file.
        schema: The run's schema.
        strategy: Plans the round.
        state: The strategy's state at the start of the round.
    """

    def __init__(self, config: RunConfig, schema: Schema, strategy: Strategy, state: State) -> None:
        self._config = config
        self._schema = schema
        self._strategy = strategy
        self._state = state
        self._names = schema.names()
        self._assignments: dict[str, Assignment] = {}
        self._payloads: dict[str, bytes] = {}
        self._starts: dict[object, tuple[Tensors, Tensors]] = {}
        self._planned: dict[object, tuple[Plan, Assignment]] = {}
        self._distinct: dict[object, Assignment] = {}
        self._digests: dict[object, list[tuple[Tensors, str]]] = {}
        self._coded = strategy.traits.coded_broadcast
        chain = steps(state)
        self._links = tuple(map(_linked, chain))
        self._payloads |= {link.digest: step.payload for link, step in zip(self._links, chain, strict=True)}
        self._uploads: dict[object, Schema] = {}
        self._rate_sums: dict[object, dict[str, float]] = {}

    def assignment(self, client: str) -> Assignment:
        """What `client` is asked to do; the same object for every client with the same plan.

        Raises:
            ConfigError: The strategy plans what this run file rules out.
            SchemaError: The plan's broadcast does not fit the schema.
            StrategyError: The strategy fails.
            CodecError: The broadcast cannot be represented under [wire] broadcast.
        """
        if client not in self._assignments:
            doing = f"plan for client {client!r}"
            with blamed(self._config.strategy.name, doing, CodecError, ConfigError, SchemaError):
                plan = self._strategy.plan(self._state, self._state.round, client)
                key = _identity(plan)
                asked = self._planned[key][1] if key in self._planned else self._encoded(plan)
            self._assignments[client] = asked
        return self._assignments[client]

    @failpoint("broadcast.prepare")
    def prepare(self, clients: Iterable[str]) -> CodecError | None:
        """Encode ahead of time what these clients will ask for; other errors than the codec's are left until then.

        Returns:
            Why the broadcast cannot be encoded; None if it can.
        """
        try:
            for client in clients:
                self.assignment(client)
        except CodecError as error:
            return error
        except (ConfigError, SchemaError, StrategyError):
            pass
        return None

    def asked(self, client: str, held: str) -> Assignment:
        """The assignment of a client that has the adapter with this digest: what leads from there, if anything does."""
        assignment = self.assignment(client)
        leading = [place for place, link in enumerate(self._links) if link.before == held]
        return replace(assignment, links=self._links[leading[0] :]) if leading else assignment

    def payload(self, client: str, digest: str) -> bytes | None:
        """The bytes under this digest, if they are of the client's broadcast or a step that leads to it; else None."""
        mine = {self.assignment(client).broadcast_digest, *(link.digest for link in self._links)}
        return self._payloads[digest] if digest in mine else None

    def start(self, client: str) -> Tensors:
        """What the client starts from: the broadcast as it reads it, after the codec's rounding."""
        return self._read(client)[0]

    def update(self, client: str, weight: float, delta: Tensors, metrics: Mapping[str, float]) -> Update:
        """What a strategy is shown of a client's answer to its assignment."""
        start, linear = self._read(client)
        return Update(client, weight, start, delta, linear=linear, rate_sums=self._steps(client), metrics=metrics)

    def upload_schema(self, client: str) -> Schema:
        """The schema of the client's update; derived once for all that are asked for the same."""
        asked = self.assignment(client)
        if (key := (asked.train, asked.personal, asked.rank)) not in self._uploads:
            self._uploads[key] = upload_schema(self._schema, asked)
        return self._uploads[key]

    def _read(self, client: str) -> tuple[Tensors, Tensors]:
        """What the client starts from, and the terms for its gradients."""
        asked = self.assignment(client)
        if (key := _address(asked)) not in self._starts:
            derived = broadcast_schema(self._schema, asked)
            start = codec(asked.broadcast_codec).decode(derived, self._payloads[asked.broadcast_digest])
            added = self._schema.select(asked.linear).tensors
            self._starts[key] = start, {spec.name: start.pop(linear_name(spec.name)) for spec in added}
        return self._starts[key]

    def _steps(self, client: str) -> dict[str, float]:
        """The sum of the learning rates of the client's steps by tensor, see `Update.rate_sums`."""
        asked = self.assignment(client)
        key = asked.train, asked.personal, asked.turns, frozenset(asked.local.items())
        if key not in self._rate_sums:
            train = overridden(self._config.train, asked.local)
            rate, head = learning_rates(train, asked.round, self._config.run.rounds)
            cycle = moving(self._schema, asked.train, asked.turns)
            steps = Counter(name for step in range(train.steps) for name in cycle[step % len(cycle)])
            self._rate_sums[key] = {
                spec.name: steps[spec.name] * (head if spec.role == Role.HEAD else rate)
                for spec in self.upload_schema(client).tensors
            }
        return self._rate_sums[key]

    def _encoded(self, plan: Plan) -> Assignment:
        """The assignment of a plan; that of an earlier one if they differ in nothing but where their tensors lie."""
        self._check(plan)
        asked = self._converted(plan)
        instructions = asked.train, asked.personal, asked.rank, frozenset(asked.local.items()), asked.turns
        distinct = *instructions, _address(asked)
        if distinct in self._distinct:
            return self._distinct[distinct]
        if self._config.secure_aggregation.enabled and self._distinct:
            raise ConfigError(
                "the strategy asks different things of different clients, whose updates cannot be summed unseen; "
                "set secure_aggregation.enabled = false or choose another strategy"
            )
        self._distinct[distinct] = asked
        # The plan is kept with its assignment: while its arrays live, their identities are not used again.
        self._planned[_identity(plan)] = plan, asked
        return asked

    def _converted(self, plan: Plan) -> Assignment:
        """The plan as a message, in which the payload's address stands for the tensors."""
        upload, broadcast = codecs_of(self._config, self._schema, self._strategy)
        asked = Assignment(
            round=self._state.round,
            train=plan.train,
            broadcast_roles=self._schema.words(plan.broadcast) | _correction_roles(plan.broadcast.keys() - self._names),
            broadcast_digest="",
            broadcast_bytes=0,
            broadcast_codec=FINAL_CODEC if self._coded else broadcast,
            upload_codec=upload,
            personal=plan.personal,
            rank=plan.rank,
            base_rank=base_rank(self._schema, plan.broadcast),
            local={name: float(value) for name, value in plan.local.items()},
            linear=self._schema.words(plan.linear),
            turns=plan.turns,
        )
        digest = self._digest(_sent(plan), asked)
        adapter = held_digest(plan.broadcast) if self._coded and not plan.linear else ""
        return replace(asked, broadcast_digest=digest, broadcast_bytes=len(self._payloads[digest]), adapter=adapter)

    def _digest(self, sent: Tensors, asked: Assignment) -> str:
        """The digest of a plan's tensors, which are encoded and hashed unless equal ones were before."""
        known = self._digests.setdefault((asked.rank, _probe(sent)), [])
        for tensors, digest in known:
            if all(_same(sent[name], each) for name, each in tensors.items()):
                return digest
        payload = codec(asked.broadcast_codec).encode(broadcast_schema(self._schema, asked), sent)
        digest = hashlib.sha256(payload).hexdigest()
        self._payloads[digest] = payload
        known.append((sent, digest))
        return digest

    def _check(self, plan: Plan) -> None:
        added = {name: each for name, each in plan.broadcast.items() if name not in self._names}
        if added:
            model = self._strategy.result(self._state)
            for name, each in added.items():
                if name not in model or not np.array_equal(model[name], each):
                    raise StrategyError(
                        f"strategy {self._config.strategy.name!r} sends clients the correction {name!r}, which is not "
                        "in its result: what this run scores and exports would not be what they train. What is "
                        "committed stays; give the strategy a method result(state), see docs/strategies.md, and start "
                        "again with the same state directory"
                    )
        trained = self._schema.select(plan.train)
        unknown = self._schema.unknown(plan.train | plan.personal)
        if unknown or not trained.tensors or not self._schema.select(plan.personal).names() <= trained.names():
            raise ConfigError(
                f"the strategy plans to train {sorted(plan.train)} and keep {sorted(plan.personal)}, "
                f"but the adapter has {sorted(self._schema.roles)}; choose another strategy or adapter kind"
            )
        uploaded = trained.names() - self._schema.select(plan.personal).names()
        for name, each in plan.linear.items():
            if name not in uploaded or not np.isfinite(each).all():
                raise StrategyError(
                    f"strategy {self._config.strategy.name!r} plans a term for the gradient of {name!r}, which "
                    f"{'has NaN or Inf' if name in uploaded else 'is not among what it trains and uploads'}. What is "
                    "committed stays; correct the strategy, and start again with the same state directory"
                )
        if Role.HEAD in trained.roles and self._config.model.head == "frozen":
            raise ConfigError('the strategy trains the head, but model.head = "frozen"; set it to "train"')
        _check_turns(self._config, plan)
        try:
            moving(self._schema, plan.train, plan.turns)
            overridden(self._config.train, plan.local)
        except ProtocolError as error:
            raise ConfigError(f"no client would take the strategy's plan: {error}; look at its options") from error


def codecs_of(config: RunConfig, schema: Schema, strategy: Strategy) -> tuple[str, str]:
    """Names of the codecs of updates and of what is broadcast; whole adapters of coded changes go in `FINAL_CODEC`.

    Without one adapter for all there are no changes to send, and four bits would take too much of the values.
    """
    wire = config.wire
    upload = MASKED if config.secure_aggregation.enabled else chosen(wire.upload, schema)
    if wire.broadcast == AUTO and not strategy.traits.coded_broadcast:
        return upload, FINAL_CODEC
    return upload, chosen(wire.broadcast, schema)


def final(schema: Schema, rounds: int, model: Tensors) -> tuple[Finished, bytes]:
    """The end of a run: its announcement, and its result under the whole schema."""
    payload = codec(FINAL_CODEC).encode(result_schema(schema, model), model)
    digest = hashlib.sha256(payload).hexdigest()
    return Finished(rounds, FINAL_CODEC, digest, len(payload), base_rank(schema, model)), payload


def _linked(step: Step) -> Link:
    """A step as a message."""
    digest, change = hashlib.sha256(step.payload).hexdigest(), step.change
    sent = frozenset(change.values), frozenset(change.changes), change.codec
    return Link(step.before, step.after, *sent, digest, len(step.payload))


def _check_turns(config: RunConfig, plan: Plan) -> None:
    """Refuse turns that a round of this run does not have."""
    if len(plan.turns) > (steps := config.train.steps):
        raise ConfigError(
            f"the strategy lets {len(plan.turns)} selections of tensors take turns, and a round has {steps} steps; "
            f"set train.steps to {len(plan.turns)} or more, best to a multiple"
        )
    if plan.turns and config.privacy.noise_bands > 1:
        raise ConfigError(
            "the strategy lets tensors take turns, and privacy.noise_bands cancels noise between steps of the same "
            "tensors; set privacy.noise_bands = 1, or choose another strategy"
        )


def _correction_roles(names: Iterable[str]) -> frozenset[str]:
    """The roles of what the schema does not know: it can only be a correction's factors."""
    return frozenset(Role.BASE_A if name.endswith(".base_A") else Role.BASE_B for name in names)


def _address(assignment: Assignment) -> object:
    """Equal for the same broadcast. The digest alone is not: zeros of other names or shapes have the same bytes."""
    asked = assignment
    return asked.broadcast_digest, asked.broadcast_roles, asked.rank, asked.base_rank, asked.linear


def _sent(plan: Plan) -> Tensors:
    """All that a plan's broadcast carries, by the names it has there."""
    return {**plan.broadcast, **{linear_name(name): each for name, each in plan.linear.items()}}


def _identity(plan: Plan) -> object:
    """Equal for plans that surely are the same: equal instructions over the very same arrays."""
    arrays = frozenset((name, id(tensor)) for name, tensor in _sent(plan).items())
    return plan.train, plan.personal, plan.rank, frozenset(plan.local.items()), plan.turns, arrays


def _probe(tensors: Tensors) -> object:
    """Equal for equal tensors, and hardly ever for others: a few of the bits of each."""
    return frozenset(
        (name, each.shape, _bits(each).ravel()[:: max(1, each.size // _PROBED)].tobytes())
        for name, each in tensors.items()
    )


def _same(one: Array, other: Array) -> bool:
    """Whether both have the same bits, at once where they are the same memory."""
    if one is other or one.__array_interface__ == other.__array_interface__:
        return True
    return one.dtype == other.dtype and np.array_equal(_bits(one), _bits(other))


def _bits(tensor: Array) -> npt.NDArray[Any]:
    """As whole numbers, for which -0 is not 0: an update is decoded against the very bytes its client had."""
    return tensor.view(f"u{tensor.itemsize}")
