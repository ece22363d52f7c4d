"""What clients hold of the adapter: it follows the strategy's own by coded changes, the same for all of them.

A client that has the adapter of an earlier round needs only what has changed since. What was trained moves by the
codec's rendering of its change; what the strategy itself has rewritten, such as the A of FedSVD, is sent exactly. What
the codec loses of a change is part of the next one (EF21-P, Gruntkowska et al., ICML 2023, arXiv 2209.15218).
"""

import json
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from fedloom.core.codecs import codec
from fedloom.core.codecs.api import seed_of
from fedloom.core.codecs.auto import chosen
from fedloom.core.codecs.changes import Change, changed, followed, held_digest
from fedloom.core.errors import CodecError, ConfigError
from fedloom.core.limits import MAX_LINKS
from fedloom.core.schema import Schema, Tensors
from fedloom.strategies.api import Plan, State, Strategy, Traits
from fedloom.strategies.result import base_rank
from fedloom.strategies.transforms.transform import Transform

__all__ = ["CodedBroadcast", "Step", "steps"]

_HELD, _STEP = "broadcast/held/", "broadcast/step/"
_ANYONE = ""


class Step(NamedTuple):
    """From what clients held to what they are to hold."""

    before: str
    """`held_digest` of the one, hex."""
    after: str
    """Of the other."""
    change: Change
    payload: bytes


@dataclass(frozen=True)
class CodedBroadcast(Transform):
    """Broadcast what clients hold in place of the adapter, and remember the changes that led there.

    The adapter itself stays exact: updates are folded into it, and it is what is scored and exported. Clients train
    from what they hold, which differs from it by what the codec lost of the last change.

    Args:
        inner: A strategy with the trait `linear`: all clients hold the same.
        codec: Name of the codec of changes, or "auto".

    Raises:
        ConfigError: The inner strategy has different plans for different clients.
    """

    inner: Strategy
    codec: str
    implied = True

    def __post_init__(self) -> None:
        """Refuse what has no one adapter to hold."""
        if not self.inner.traits.linear:
            raise ConfigError(
                f"strategy {type(self.inner).__name__} may send different clients different tensors, and changes are "
                "coded against what all of them hold"
            )

    @property
    def traits(self) -> Traits:
        """The inner strategy's, and that it holds an adapter for all."""
        return replace(self.inner.traits, coded_broadcast=True)

    def plan(self, state: State, round: int, client: str) -> Plan:
        """The inner strategy's plan, from what clients hold."""
        plan = self.inner.plan(state, round, client)
        held = {name: state.memory.get(_HELD + name, each) for name, each in plan.broadcast.items()}
        return replace(plan, broadcast=held)

    def commit(self, state: State, acc: Any) -> State:
        """What the inner strategy commits, and what clients hold after it."""
        before = self.plan(state, state.round, _ANYONE)
        own = {name: each for name, each in state.memory.items() if not name.startswith((_HELD, _STEP))}
        after = self.inner.commit(replace(state, memory=own), acc)
        wanted = self.inner.plan(after, after.round, _ANYONE).broadcast
        if _shapes(before.broadcast) != _shapes(wanted) or not all(np.isfinite(each).all() for each in wanted.values()):
            return after  # nothing leads there: clients get the whole, or the round is void
        rank = base_rank(state.schema, wanted)
        schema = (state.schema.with_base(rank) if rank else state.schema).select(wanted)
        trained, seed = state.schema.select(before.train).names(), seed_of(state.seed, state.round, "broadcast")
        name = chosen(self.codec, state.schema)
        chain = steps(state)
        # A chain ends at what is held, whose digest it has.
        start = chain[-1].after if chain else held_digest(before.broadcast)
        try:
            step, held = self._step(schema, name, start, before.broadcast, wanted, trained, seed)
        except CodecError:
            return after  # beyond what the codec carries: the whole is float32
        memory = {_HELD + name: each for name, each in held.items() if not np.array_equal(each, wanted[name])}
        for place, each in enumerate(_short([*chain, step], schema)):
            memory[f"{_STEP}{place:02d}"] = _packed(each)
        return replace(after, memory={**after.memory, **memory})

    def _step(
        self,
        schema: Schema,
        name: str,
        start: str,
        before: Tensors,
        wanted: Tensors,
        trained: frozenset[str],
        seed: bytes,
    ) -> tuple[Step, Tensors]:
        """The step from `before`, whose digest is `start`, toward `wanted` in the codec `name`, and where it ends."""
        other = {name for name, each in wanted.items() if not np.array_equal(each, before[name])}
        coded = other & trained if codec(name).traits.mean_error != 0 else set[str]()
        change = Change(schema.words(other - coded), schema.words(coded), name)
        payload = changed(schema, before, wanted, change, seed)
        held = followed(schema, before, payload, change)
        return Step(start, held_digest(held), change, payload), held


def steps(state: State) -> list[Step]:
    """The newest steps, oldest first; each begins where the one before it ends, and the last ends at what is held."""
    return [_unpacked(state.memory[name]) for name in sorted(state.memory) if name.startswith(_STEP)]


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: each.shape for name, each in tensors.items()}


def _short(chain: list[Step], schema: Schema) -> list[Step]:
    """The newest steps that together are shorter than the whole."""
    room, kept = 4 * schema.size, list[Step]()
    for step in reversed(chain[-MAX_LINKS:]):
        room -= len(step.payload)
        if room < 0:
            break
        kept.append(step)
    return kept[::-1]


def _packed(step: Step) -> Any:
    """A line of JSON and the payload, as bytes in an array."""
    about = [step.before, step.after, sorted(step.change.values), sorted(step.change.changes), step.change.codec]
    return np.frombuffer(json.dumps(about, separators=(",", ":")).encode() + b"\n" + step.payload, np.uint8)


def _unpacked(content: Any) -> Step:
    text, _, payload = content.tobytes().partition(b"\n")
    before, after, values, changes, name = json.loads(text)
    return Step(before, after, Change(frozenset(values), frozenset(changes), name), payload)
