"""How far an honest client's round can move its tensors, from the run's own numbers."""

import math

from fedloom.core.config.run import RunConfig
from fedloom.proto.checks import overridden
from fedloom.server.rounds.broadcast import Order

__all__ = ["largest_norm"]

_FACTOR = 10.0
"""Room for rounded declarations, samples and noise above their mean, and steps that all point one way."""

_GRADIENT = 1000.0
"""L2 norm of a mean gradient that is not clipped; a model that trains has 0.1 to 100."""

_ADAM_STEP = 3.2
"""Adam moves a value by at most (1 - 0.9) / sqrt(1 - 0.999) learning rates in one step (Kingma and Ba, section 2.1)."""


def largest_norm(config: RunConfig, order: Order, declared_examples: int) -> float:
    """L2 norm over all tensors that an update is refused beyond when the run file sets no rounds.max_update_norm.

    Ten times what T steps of learning rate r come to if every step goes the same way. For d trained values, rate q, n
    declared examples, B = q·n, clip norm C and noise multiplier σ, one step of private SGD is at most
    r·C·(1 + (1 + σ·√d) / B): the clipped sum of B examples and one more, and the noise, over B. Without privacy it is
    r·1000. Momentum m divides it by 1 - m. A step of Adam is at most 3.2·r·√d. A FedProx pull that overshoots,
    r·mu above 2, lets SGD grow by r·mu - 1 in each step.

    Args:
        config: The run file, its noise multiplier filled in.
        order: What the client was asked to do.
        declared_examples: n; below 1 it counts as 1.

    Returns:
        A positive number, infinite where the pull explodes.
    """
    train, privacy = overridden(config.train, order.assignment.local), config.privacy
    rate, values = max(train.learning_rate, train.head_learning_rate or 0.0), math.sqrt(order.upload.size)
    if train.optimizer == "adam":
        return _FACTOR * train.steps * _ADAM_STEP * rate * values
    step = _GRADIENT
    if privacy.enabled and privacy.noise_multiplier is not None:
        batch = train.sampling_rate * max(1, declared_examples)
        step = privacy.clip_norm * (1 + (1 + privacy.noise_multiplier * values) / batch)
    growth = train.steps * math.log(max(1.0, rate * train.proximal_mu - 1))
    if growth > 500:
        return math.inf
    return _FACTOR * train.steps * rate * step / (1 - train.momentum) * math.exp(growth)
