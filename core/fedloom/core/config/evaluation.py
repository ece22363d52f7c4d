"""What federated evaluation takes for granted at both ends."""

import math

from fedloom.core.config.run import Spec

__all__ = ["largest_loss"]

_LARGEST_TEXT_LOSS = 10.0
"""Loss in nats of guessing among the tokens of a usual vocabulary, which trained models do not come near."""


def largest_loss(spec: Spec) -> float:
    """Loss in nats at which that of one row is cut: what the run says, or else twice that of guessing."""
    if spec.federated_evaluation.max_loss is not None:
        return spec.federated_evaluation.max_loss
    labels = len(spec.model.labels)
    return 2 * math.log(labels) if labels > 1 else _LARGEST_TEXT_LOSS
