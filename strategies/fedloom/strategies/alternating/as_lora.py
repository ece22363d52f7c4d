"""AS-LoRA (Kim et al., 2026, arXiv 2605.05769)."""

import math
from dataclasses import dataclass, replace

import numpy as np

from fedloom.core.errors import ConfigError
from fedloom.core.schema import LORA, Array, Role, Schema, Tensors
from fedloom.strategies.api import Plan, State, Strategy, Traits, Update
from fedloom.strategies.transforms.average import Sum, apply_mean_delta, begin, fold, mean, trained

__all__ = ["ASLoRA"]

_SCORES = "as_lora/scores"
"""Name in the memory: shape (pairs, 2), of B and of A; NaN before a factor has moved for the first time."""

_KEPT, _COOLING, _COLDEST = 0.9, 0.95, 0.1
"""Share of the old score; factor of the temperature in each round, from 1, and where it ends (the paper's settings)."""


@dataclass(frozen=True)
class _Scored:
    """A sum of updates, and of the noise's variance in each of its values."""

    sum: Sum
    variance: float


@dataclass(frozen=True)
class ASLoRA(Strategy):
    """In each round and for each pair, train the factor whose changes have more energy beyond their noise.

    After a round, the score of what a pair has trained becomes 0.9 of itself and 0.1 of max(|d|^2 - n s^2, 0): d is the
    mean change of the factor, n its number of values and s^2 the variance that noise has in each of them,
    sum_k p_k^2 s_k^2. With scores S_A and S_B, the next round trains A with probability 1 / (1 + exp(-x / t)) for
    x = (S_A - S_B) / (S_A + S_B); the temperature t falls from 1 to 0.1, by 0.95 in each round after the warm-up.
    Choices are drawn from the run's seed and the same for all clients, so that what rests is shared and every average
    is exact. Scores are functions of what clients have noised: they cost no privacy.

    Left out is the paper's term of curvature, which takes losses that no noise covers. The paper's code scores the
    gradient of each client's last step and takes the mean; here the mean change of the whole round is scored, in which
    noise has a smaller part. It chooses for each layer, here for each pair, of which a layer may have several.

    Args:
        warmup: Rounds in which all pairs train B and A by turns, at least 2: the paper has a tenth of its 100.
        train_head: Whether the head is trained, in every round; it is broadcast either way.

    Raises:
        ConfigError: The warm-up is too short for both factors to have a score.
    """

    warmup: int = 10
    train_head: bool = True

    def __post_init__(self) -> None:
        """Refuse a warm-up after which a factor has no score."""
        if self.warmup < 2:
            raise ConfigError(f"warmup is {self.warmup}; set 2 rounds or more, so that both factors have a score")

    @property
    def traits(self) -> Traits:
        """Noise is that of each update, so their mean is not enough."""
        return Traits(reads_noise=True)

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The state before the first round, without any score.

        Raises:
            SchemaError: There are no pairs, or the adapter does not fit.
        """
        trained(schema, LORA, head=self.train_head)
        unknown = np.full((len(schema.pairs), 2), np.nan)
        return replace(begin(schema, adapter, seed), memory={_SCORES: unknown})

    def plan(self, state: State, round: int, client: str) -> Plan:
        """One factor of every pair, and the head."""
        return Plan(state.schema.words(self._trained(state).names()), state.adapter)

    def fold(self, state: State, acc: _Scored | None, update: Update) -> _Scored:
        """Add one weighted update and its noise.

        Raises:
            SchemaError: A tensor is missing, unexpected or of another shape.
            UpdateRejected: The change or the weight is not usable.
        """
        total = fold(self._trained(state), acc.sum if acc else None, update)
        return _Scored(total, (acc.variance if acc else 0.0) + (update.weight * update.noise_std) ** 2)

    def commit(self, state: State, acc: _Scored | None) -> State:
        """Move the adapter by the mean change, and score what has moved.

        Raises:
            ProtocolError: No update was folded.
        """
        adapter = apply_mean_delta(state.adapter, acc.sum if acc else None)
        assert acc is not None  # or there would be no mean
        scores, change = state.memory[_SCORES].copy(), mean(acc.sum)
        for row, (pair, trains_a) in enumerate(zip(state.schema.pairs, self._choices(state), strict=True)):
            moved = change[pair.a if trains_a else pair.b]
            energy = max(float(np.vdot(moved, moved)) - moved.size * acc.variance / acc.sum.weight**2, 0.0)
            before = scores[row, int(trains_a)]
            scores[row, int(trains_a)] = energy if math.isnan(before) else _KEPT * before + (1 - _KEPT) * energy
        return replace(state, adapter=adapter, round=state.round + 1, memory={**state.memory, _SCORES: scores})

    def _trained(self, state: State) -> Schema:
        pairs = zip(state.schema.pairs, self._choices(state), strict=True)
        words = {pair.a if trains_a else pair.b for pair, trains_a in pairs}
        return state.schema.select(words | {Role.HEAD} if self.train_head else words)

    def _choices(self, state: State) -> list[bool]:
        """For every pair, whether this round trains its A; the same whenever it is asked in a round."""
        count, after = len(state.schema.pairs), state.round - self.warmup
        if after < 0:
            return [state.round % 2 == 1] * count
        drawn = np.random.Generator(np.random.Philox(key=[state.seed, state.round])).random(count)
        chosen: list[bool] = (drawn < _probabilities(state.memory[_SCORES], max(_COLDEST, _COOLING**after))).tolist()
        return chosen


def _probabilities(scores: Array, temperature: float) -> Array:
    """Of training A, by the scores of B and A; a half where both are zero."""
    b, a = scores.T
    difference = (a - b) / np.maximum(a + b, np.finfo(np.float64).tiny)
    found: Array = 1 / (1 + np.exp(-difference / temperature))
    return found
