"""DP-FedAvg (McMahan et al., ICLR 2018, arXiv 1710.06963) around any linear strategy, on a trusted coordinator.

With the adaptive clip norm of Andrew et al. (NeurIPS 2021, arXiv 1905.03871) or the tree noise of DP-FTRL
(Kairouz et al., ICML 2021, arXiv 2103.00039).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from fedloom.core.errors import ConfigError, ProtocolError, UpdateRejected
from fedloom.core.privacy.gaussian import UNITS, Integers, deviation, longest
from fedloom.core.schema import Array, Schema, Tensors
from fedloom.strategies.api import Plan, State, Strategy, Traits, Update
from fedloom.strategies.transforms.average import check, uploaded
from fedloom.strategies.transforms.noise import KEY_BYTES, derive, normal
from fedloom.strategies.transforms.norm_bound import norm
from fedloom.strategies.transforms.transform import Transform, named
from fedloom.strategies.transforms.tree_noise import retired

__all__ = ["Clipped", "UserLevel", "check_memory", "count_noise"]

_PREFIX = "user_level/"
_CLIP, _SECRET, _NODES, _GRID = (_PREFIX + name for name in ("clip_norm", "secret", "nodes", "grid"))
_COUNT_STREAM, _COUNT_UNITS = 0, 1 << 10
_ANYONE = ""
"""The client whose plan everybody gets: a plan that depended on the client would not be linear."""


@dataclass(frozen=True)
class Clipped:
    """A running sum of clipped updates."""

    count: int
    """Updates so far."""
    within: int
    """How many of them the clip norm left as they were."""
    total: Mapping[str, Integers]
    """Sum of the clipped changes in steps of the grid, S being `UNITS` of them, by tensor name."""


@dataclass(frozen=True)
class UserLevel(Transform):
    """Clip each client's whole update, add noise to the sum, and let another strategy commit the noised mean.

    With S the clip norm, m the cohort, z the noise multiplier and d_k client k's change of all trained tensors
    as one vector, the inner strategy is handed one update in place of the clients':
    (sum_k d_k min(1, S / |d_k|) + N(0, (z S)^2)) / m. The denominator is a public constant and weights are uniform,
    so replacing one client's update by zero moves the mean by at most S / m. A strategy is `linear` if
    its commit depends on the updates only through their uniform mean, and its plan not on the client; for those
    this is exact, and others are refused. Clipped changes are rounded to a grid of S / `UNITS`, summed without error
    and given noise in whole steps, see `fedloom.core.privacy.gaussian`: rounding is part of the guarantee.

    - "gaussian": fresh noise in every round.
    - "tree": the sum over rounds carries the noise of a binary tree, see `tree_noise`. Its
      privacy needs no random choice of clients. It pays when a client takes part in few of the rounds.
    - `target_quantile` (gaussian only): after each round S <- S exp(-rate (b - quantile)), b being the noised
      share of updates within S. When more are within than the target, S shrinks. An update that is missing from
      the cohort counts as half within. The count's noise is paid for out of `noise_multiplier`, see `count_noise`.

    The noise is a function of a secret, the round and the exact clipped sum. A replay after a crash repeats it, and a
    state directory that was rolled back and continued otherwise draws other noise, so that no two releases share
    theirs. The secret lives in `State.memory`, drawn by whoever made the first instance; later instances go on with
    the stored one. Neither it nor the clip norm is part of any plan.

    Args:
        inner: A linear strategy.
        secret: 32 bytes from the operating system; used by `init` alone.
        cohort: The fixed denominator m, at least 1.
        clip_norm: S, positive; its start if it adapts.
        noise_multiplier: z, positive.
        mechanism: "gaussian" or "tree".
        target_quantile: Share of updates to leave unclipped, in (0, 1); None keeps S.
        clip_rate: Learning rate of log S, positive.

    Raises:
        ConfigError: The inner strategy is not linear, or a number is out of range.
    """

    inner: Strategy
    secret: bytes = field(repr=False)
    cohort: int
    clip_norm: float
    noise_multiplier: float
    mechanism: Literal["gaussian", "tree"] = "gaussian"
    target_quantile: float | None = None
    clip_rate: float = 0.2

    def __post_init__(self) -> None:
        """Refuse what has no user-level guarantee."""
        name = named(self.inner)
        if not self.inner.traits.linear:
            raise ConfigError(
                f"strategy {name} does not declare the trait linear; user-level privacy hands it one noised mean, "
                "so choose fedavg, ffa, fedsvd or fedpeft, or switch user_level off"
            )
        if self.mechanism == "tree" and (reason := _breaks_tree(self.inner.traits)):
            raise ConfigError(
                f"strategy {name} {reason}, so that tree noise no longer cancels from round to round; "
                'set user_level.mechanism = "gaussian" or choose another strategy'
            )
        if self.mechanism == "tree" and self.target_quantile is not None:
            raise ConfigError('tree noise needs a fixed clip norm; drop target_quantile or set mechanism = "gaussian"')
        numbers = (self.clip_norm, self.noise_multiplier, self.clip_rate)
        if len(self.secret) != KEY_BYTES or self.cohort < 1 or not all(0 < each < math.inf for each in numbers):
            raise ConfigError(
                f"user-level privacy with cohort {self.cohort}, clip norm, noise multiplier and rate {numbers} and a "
                f"secret of {len(self.secret)} bytes; cohort from 1, positive numbers and {KEY_BYTES} bytes are needed"
            )
        deviation(1.2 * self.noise_multiplier)  # with an adaptive clip norm the sum has up to 1.16 times as much
        if self.target_quantile is not None and not 0 < self.target_quantile < 1:
            raise ConfigError(f"target quantile {self.target_quantile} must lie in (0, 1)")

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The inner strategy's state, with the secret and the clip norm beside its memory.

        Raises:
            SchemaError: See the inner strategy.
        """
        state = self.inner.init(schema, adapter, seed)
        ours: dict[str, Array] = {
            _CLIP: np.array(self.clip_norm, np.float64),
            _SECRET: np.frombuffer(self.secret, np.uint8),
            _NODES: np.zeros((0, KEY_BYTES), np.uint8),
            _GRID: np.array(UNITS),
        }
        return replace(state, memory={**state.memory, **ours})

    @property
    def traits(self) -> Traits:
        """The inner strategy's, but that it must see every update to clip it."""
        return replace(self.inner.traits, linear=False)

    def result(self, state: State) -> Tensors:
        """The inner strategy's result."""
        return self.inner.result(_inner(state))

    def plan(self, state: State, round: int, client: str) -> Plan:
        """The inner strategy's plan, the same for all clients."""
        return self.inner.plan(_inner(state), round, _ANYONE)

    def check(self, state: State, update: Update) -> None:
        """Refuse a weight for which the clip norm bounds nothing.

        Raises:
            UpdateRejected: The weight is not 1.
        """
        if update.weight != 1.0:
            raise UpdateRejected(
                f"client {update.client!r} has weight {update.weight:g}; user-level privacy bounds clients of weight 1 "
                'only, set strategy.weighting = "uniform"'
            )

    def fold(self, state: State, acc: Clipped | None, update: Update) -> Clipped:
        """The sum after one more update, clipped; the one given is used up.

        Raises:
            SchemaError: A tensor is missing, unexpected or of another shape.
            UpdateRejected: The change is not usable (`average.check`), or the weight is not 1.
        """
        check(uploaded(state.schema, self.plan(state, state.round, _ANYONE)), update)
        self.check(state, update)
        clip = float(state.memory[_CLIP])
        length = norm(update)
        scale = longest(sum(each.size for each in update.delta.values())) / max(length, clip)
        clipped = {name: np.rint(np.multiply(each, scale, dtype=np.float64)) for name, each in update.delta.items()}
        if acc is None:
            return Clipped(1, int(length <= clip), {name: each.astype(np.int64) for name, each in clipped.items()})
        for name, more in clipped.items():
            np.add(acc.total[name], more, out=acc.total[name], casting="unsafe")  # whole numbers below 2^53
        return Clipped(acc.count + 1, acc.within + int(length <= clip), acc.total)

    def commit(self, state: State, acc: Clipped | None) -> State:
        """Add the round's noise, let the inner strategy commit the noised mean, and move the clip norm.

        Raises:
            ProtocolError: No update was folded.
        """
        if acc is None:
            raise ProtocolError("a round without updates cannot be committed; wait for at least one client")
        clip, key = float(state.memory[_CLIP]), _key(state, acc)
        live = [each.tobytes() for each in state.memory[_NODES]]
        leaving = live[len(live) - retired(state.round) :]
        multiplier = self.noise_multiplier
        if self.target_quantile is not None:
            multiplier, _ = count_noise(self.noise_multiplier, self.cohort)
        wide = deviation(multiplier)
        scale = clip / longest(sum(each.size for each in acc.total.values())) / self.cohort
        noised: dict[str, Array] = {}
        for stream, (name, total) in enumerate(sorted(acc.total.items()), _COUNT_STREAM + 1):
            noise = normal(key, stream, wide, total.size)
            for gone in leaving:
                noise -= normal(gone, stream, wide, total.size)
            noised[name] = ((total + noise.reshape(total.shape)) * scale).astype(np.float32)
        inner = _inner(state)
        start = self.inner.plan(inner, state.round, _ANYONE).broadcast
        mean = Update("noised mean", 1.0, start, noised)
        after = self.inner.commit(inner, self.inner.fold(inner, None, mean))
        ours = {_CLIP: np.array(self._moved(clip, acc, key)), _SECRET: state.memory[_SECRET], _GRID: np.array(UNITS)}
        kept = [*live[: len(live) - len(leaving)], key] if self.mechanism == "tree" else []
        ours[_NODES] = np.frombuffer(b"".join(kept), np.uint8).reshape(-1, KEY_BYTES)
        return replace(after, memory={**after.memory, **ours})

    def _moved(self, clip: float, acc: Clipped, key: bytes) -> float:
        """The next clip norm: geometric steps towards the target quantile (Andrew et al., 2021)."""
        if self.target_quantile is None:
            return clip
        # Counted from one half, so that a client's presence moves the sum by 1/2 and its absence by nothing.
        _, wide = count_noise(self.noise_multiplier, self.cohort)
        steps = (2 * acc.within - acc.count) * _COUNT_UNITS
        centred = int(steps + normal(key, _COUNT_STREAM, math.ceil(2 * wide * _COUNT_UNITS), 1)[0]) / (2 * _COUNT_UNITS)
        share = 0.5 + centred / self.cohort
        return clip * math.exp(-self.clip_rate * (share - self.target_quantile))


def count_noise(noise_multiplier: float, cohort: int) -> tuple[float, float]:
    """How a round's noise is split between the sum of updates and the count of those within the clip norm.

    One client moves the centred count by 1/2, so noise of deviation s on it has multiplier 2 s. Together with the
    sum's multiplier z' the round is one Gaussian of multiplier z when z^-2 = z'^-2 + (2 s)^-2 (Andrew et al.,
    theorem 1). s is cohort / 20 as in the paper, but at least z, so that z' is never more than 1.16 z.

    Returns:
        z', the multiplier of the noise on the sum, and s, the standard deviation of the noise on the count.

    >>> [round(each, 4) for each in count_noise(1.0, 100)]
    [1.005, 5.0]
    """
    deviation = max(cohort / 20, noise_multiplier)
    return (noise_multiplier**-2 - (2 * deviation) ** -2) ** -0.5, deviation


def check_memory(state: State) -> None:
    """Refuse the state of a run whose tree holds noise that was drawn in another way, which could not be taken out.

    Raises:
        ConfigError: It was written by release 0.1 in the middle of a tree.
    """
    if len(state.memory[_NODES]) and _GRID not in state.memory:
        raise ConfigError(
            'this run was begun by fedloom 0.1 with user_level.mechanism = "tree", whose noise this release draws on a '
            "grid; finish it with 0.1, or begin a new run from its exported adapter"
        )


def _breaks_tree(traits: Traits) -> str:
    """Why the noise of one round cannot be taken out in another; empty where it can."""
    if traits.rewrites:
        return "rewrites its coordinates"
    if traits.moments:
        return "scales the changes of its rounds by moments"
    return "" if traits.same_tensors else "does not train the same tensors in every round"


def _inner(state: State) -> State:
    """The state as the inner strategy knows it."""
    return replace(state, memory={name: each for name, each in state.memory.items() if not name.startswith(_PREFIX)})


def _key(state: State, acc: Clipped) -> bytes:
    """The key of this round's noise, from the secret and everything that the round releases something about."""
    numbers = np.array([state.round, acc.count, acc.within, float(state.memory[_CLIP])], np.float64)
    totals = (np.ascontiguousarray(acc.total[name]).data for name in sorted(acc.total))
    return derive(state.memory[_SECRET].tobytes(), (numbers.data, *totals))
