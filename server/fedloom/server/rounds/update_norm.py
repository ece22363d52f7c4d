"""How far an honest client's round can move its tensors, from the run's own numbers."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from fedloom.core.config.run import RunConfig, TrainSection
from fedloom.core.privacy.banded import Banded
from fedloom.core.privacy.spends import banded
from fedloom.proto.checks import overridden

__all__ = ["largest_norm"]

_FACTOR = 10.0
"""Room for rounded declarations, samples and noise above their mean, and steps that all point one way."""

_GRADIENT = 1000.0
"""L2 norm of a mean gradient that is not clipped; a model that trains has 0.1 to 100."""


def largest_norm(config: RunConfig, local: Mapping[str, float], values: int, declared_examples: int) -> float:
    """L2 norm over all tensors that an update is refused beyond when the run file sets no rounds.max_update_norm.

    Ten times what the run's optimiser comes to if every step goes the same way. For d trained values, rate q, n
    declared examples, B = q·n, clip norm C and noise multiplier σ, a private gradient is at most
    C·(1 + (1 + σ·√d) / B) long: the clipped sum of B examples and one more, and the noise, over B. With noise bands σ
    is that of the step with the most noise. Without privacy it counts as 1000.

    Args:
        config: The run file, its noise multiplier filled in.
        local: What of [train] the assignment overrides.
        values: d.
        declared_examples: n; below 1 it counts as 1.

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
    return _FACTOR * float(optimizer.longest_move(train.steps, rate, gradient, values, train.proximal_mu))


@lru_cache(maxsize=64)
def _widest(strategy: Banded | None) -> float:
    """The most noise of a round's steps, over that of independent noise."""
    return 1.0 if strategy is None else float(strategy.spread().max())


@lru_cache(maxsize=64)
def _optimizer(train: str) -> Any:
    """The optimiser of [train], given as JSON: looked up once, and not for every update."""
    return TrainSection.model_validate_json(train).built()
