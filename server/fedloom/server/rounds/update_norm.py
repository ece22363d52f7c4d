"""How far an honest client's round can move its tensors, and how far noise alone does, from the run's own numbers."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from fedloom.core.config.run import RunConfig, TrainSection
from fedloom.core.config.schedules import share_of_rate
from fedloom.core.errors import ConfigError
from fedloom.core.privacy.banded import Banded
from fedloom.core.privacy.iterates import noise_of_mean
from fedloom.core.privacy.spends import banded
from fedloom.core.schema import Tensors
from fedloom.proto.checks import overridden

__all__ = ["check_noise", "largest_norm", "moves_linearly", "noise_std"]

_FACTOR = 10.0
"""Room for rounded declarations, samples and noise above their mean, and steps that all point one way."""

_GRADIENT = 1000.0
"""L2 norm of a mean gradient that is not clipped; a model that trains has 0.1 to 100."""


_NONE: Tensors = {}


def largest_norm(
    config: RunConfig, local: Mapping[str, float], values: int, declared_examples: int, linear: Tensors = _NONE
) -> float:
    """L2 norm over all tensors that an update is refused beyond when the run file sets no rounds.max_update_norm.

    Ten times what the run's optimiser comes to if every step goes the same way. For d trained values, rate q, n
    declared examples, B = q·n, clip norm C and noise multiplier σ, a private gradient is at most
    C·(1 + (1 + σ·√d) / B) long: the clipped sum of B examples and one more, and the noise, over B. With noise bands σ
    is that of the step with the most noise. Without privacy it counts as 1000. A term that the assignment adds to each
    gradient is known to the last bit and lengthens the steps by its own length, once and not ten times.

    Args:
        config: The run file, its noise multiplier filled in.
        local: What of [train] the assignment overrides.
        values: d.
        declared_examples: n; below 1 it counts as 1.
        linear: That term.

    Returns:
        A positive number, infinite where the pull explodes.
    """
    train, privacy = overridden(config.train, local), config.privacy
    optimizer = _optimizer(train.model_dump_json())
    rate = max(train.learning_rate, train.head_learning_rate or 0.0)
    gradient = _GRADIENT
    if privacy.enabled and privacy.noise_multiplier is not None:
        batch = train.sampling_rate * max(1, declared_examples)
        noise = privacy.noise_multiplier * _widest(banded(config)) * math.sqrt(values)
        gradient = privacy.clip_norm * (1 + (1 + noise) / batch)
    gradient += math.sqrt(sum(float(np.square(each, dtype=np.float64).sum()) for each in linear.values())) / _FACTOR
    return _FACTOR * float(optimizer.longest_move(train.steps, rate, gradient, values, train.proximal_mu))


def noise_std(config: RunConfig, round: int, local: Mapping[str, float], declared_examples: int) -> float:
    """Standard deviation of what the noise of a round moves each value by, of a tensor that moves in every step.

    By the learning rate of the round, but for the head's own. For SGD without momentum or a mean of iterates it is
    rate sqrt(steps) sigma C / B, with B = q n as above.

    Args:
        config: The run file, its noise multiplier filled in.
        round: Counted from 0; the learning rate may depend on it.
        local: What of [train] the assignment overrides.
        declared_examples: n; below 1 it counts as 1.

    Returns:
        0 without privacy.

    Raises:
        ConfigError: The run's optimizer leaves it unknown.
    """
    train, privacy = overridden(config.train, local), config.privacy
    if not privacy.enabled:
        return 0.0
    rate = share_of_rate(train, round, config.run.rounds) * train.learning_rate
    step = (privacy.noise_multiplier or 0.0) * privacy.clip_norm / (train.sampling_rate * max(1, declared_examples))
    claimed = getattr(_optimizer(train.model_dump_json()), "noise_moved", None)
    if claimed is None or claimed(1, rate, step) is None or train.proximal_mu or privacy.noise_bands > 1:
        raise ConfigError(
            f"strategy {config.strategy.name!r} takes the noise out of what it measures, and [train] leaves open how "
            'far noise moves a value; set train.optimizer = "sgd" without smoothing, and leave out '
            "train.proximal_mu and privacy.noise_bands"
        )
    return noise_of_mean(lambda steps: float(claimed(steps, rate, step)), train.steps, train.ema)


def moves_linearly(config: RunConfig) -> bool:
    """Whether a round's move is the same linear function of its gradients in all directions, as SGD's is."""
    claimed = getattr(_optimizer(config.train.model_dump_json()), "noise_moved", None)
    return claimed is not None and claimed(config.train.steps, 1.0, 1.0) is not None


def check_noise(config: RunConfig) -> None:
    """Refuse a run file for a strategy that looks at the noise of each update, where that is not known.

    Raises:
        ConfigError: The optimizer leaves it unknown, or clients are protected by other noise, or seen as a sum only.
    """
    if config.secure_aggregation.enabled or config.user_level.enabled:
        raise ConfigError(
            f"strategy {config.strategy.name!r} looks at the noise of each update by itself, which neither "
            "secure_aggregation.enabled nor user_level.enabled goes with; switch that off or choose another strategy"
        )
    noise_std(config, 0, {}, 1)


@lru_cache(maxsize=64)
def _widest(strategy: Banded | None) -> float:
    """The most noise of a round's steps, over that of independent noise."""
    return 1.0 if strategy is None else float(strategy.spread().max())


@lru_cache(maxsize=64)
def _optimizer(train: str) -> Any:
    """The optimiser of [train], given as JSON: looked up once, and not for every update."""
    return TrainSection.model_validate_json(train).built()
