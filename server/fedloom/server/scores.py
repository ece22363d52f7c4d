"""What the clients' evaluations say together. Nothing is decided by it: a client that lies spoils a figure, no more."""

import math
from collections.abc import Collection

import numpy as np

from fedloom.proto.run import Spec
from fedloom.server.rounds import Event, RoundOpened, UpdateAccepted

__all__ = ["Scores", "federated_score"]

_LEAST_SIGNAL = 3.0
"""How many standard deviations of its noise the number of rows must be, for a share of it to mean anything."""


class Scores:
    """The scores of the updates accepted in the round that was opened last, followed through the log."""

    def __init__(self) -> None:
        self._scores: dict[str, tuple[float, ...]] = {}

    def add(self, event: Event) -> None:
        """One more event of the log."""
        if isinstance(event, RoundOpened) and event.attempt == 0:
            self._scores = {}
        elif isinstance(event, UpdateAccepted) and event.score:
            self._scores[event.client] = event.score

    def of(self, spec: Spec) -> dict[str, float] | None:
        """`federated_score` of the round that was opened last."""
        return federated_score(spec, self._scores.values())


def federated_score(spec: Spec, scores: Collection[tuple[float, ...]]) -> dict[str, float] | None:
    """Accuracy and loss over the held-out rows of all clients, each row counting the same.

    Args:
        spec: The run.
        scores: What the clients have released, each `federated_evaluation.figures` numbers: see
            `fedloom.client.evaluation`.

    Returns:
        accuracy in [0, 1], loss in nats, and accuracy's standard_error, by the noise and by the number of rows; with
        personalised evaluation personalised_accuracy and personalised_loss. None where nothing was released, or the
        noise is as large as what it covers.
    """
    section = spec.federated_evaluation
    if not scores:
        return None
    scale = math.sqrt(section.figures)
    sums = scale * np.array(list(scores), np.float64).sum(0)
    noise = scale * section.noise_multiplier * math.sqrt(len(scores)) if spec.privacy.enabled else 0.0
    rows = float(sums[0])
    if rows < max(1.0, _LEAST_SIGNAL * noise):
        return None
    shares = np.clip(sums[1:] / rows, 0.0, 1.0)
    accuracy = float(shares[0])
    variance = (noise / rows) ** 2 * (1 + accuracy**2) + accuracy * (1 - accuracy) / rows
    found = {
        "accuracy": accuracy,
        "loss": float(section.max_loss * shares[1]),
        "standard_error": math.sqrt(variance),
    }
    if section.personalised:
        found["personalised_accuracy"] = float(shares[2])
        found["personalised_loss"] = float(section.max_loss * shares[3])
    return found
