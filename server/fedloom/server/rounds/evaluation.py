"""What the clients' evaluations say, together and one by one.

No round depends on it unless the strategy looks at `Update.metrics`: a client that lies spoils a figure, no more.
"""

import math
from collections.abc import Collection

import numpy as np

from fedloom.core.config.evaluation import largest_loss
from fedloom.core.config.run import Spec
from fedloom.server.rounds.state import Event, RoundOpened, UpdateAccepted

__all__ = ["Scores", "client_metrics", "federated_score"]

_LEAST_SIGNAL = 3.0
"""How many standard deviations of its noise the number of rows must be, for a share of it to mean anything."""
_NORMAL_95 = 1.96
"""Standard deviations on either side within which a normal variable is in 95 of 100 cases."""
_WIDEST = 0.25
"""Widest margin of a figure between 0 and 1 that is told: beyond it, half of all is within the interval."""


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

    def of(self, spec: Spec) -> dict[str, float | None] | None:
        """`federated_score` of the round that was opened last."""
        return federated_score(spec, self._scores.values())


def federated_score(spec: Spec, scores: Collection[tuple[float, ...]]) -> dict[str, float | None] | None:
    """Accuracy and loss over the held-out rows of all clients, each row counting the same.

    Args:
        spec: The run.
        scores: What the clients have released, each `federated_evaluation.figures` numbers, or three for the model
            that a run ended with: see `fedloom.client.training.local_eval`.

    Returns:
        accuracy in [0, 1] and loss in nats, each with a NAME_margin, half the width of its 95 % interval by the noise
        and by the number of rows, of which the worst is supposed for losses; and accuracy's standard_error. With
        personalised evaluation personalised_accuracy and personalised_loss likewise. A figure whose interval is more
        than half of what is possible is None, and so is its margin. None alone where nothing was released, or the
        noise is as large as what it covers.
    """
    if not scores or (means := _means(spec, scores)) is None:
        return None
    rows, noise, shares = means
    found: dict[str, float | None] = {}
    for name, share in shares.items():
        unit = _unit(spec, name)
        # Of values in [0, 1] with this mean none vary more than ones and zeros, which is what right answers are.
        error = math.sqrt((noise / rows) ** 2 * (1 + share**2) + share * (1 - share) / rows)
        clear = _NORMAL_95 * error <= _WIDEST
        found[name] = unit * share if clear else None
        found[f"{name}_margin"] = _NORMAL_95 * unit * error if clear else None
        if name == "accuracy":
            found["standard_error"] = error if clear else None
    return found


def client_metrics(spec: Spec, score: tuple[float, ...]) -> dict[str, float]:
    """What one client's evaluation says, as `Update.metrics` has it.

    Args:
        spec: The run.
        score: What the client has released, see `federated_score`; () where it has released nothing.

    Returns:
        held_out_rows, accuracy and loss, and personalised_accuracy and personalised_loss where both are measured.
        Nothing where nothing was released, or the noise is as large as what it covers.
    """
    if not score or (means := _means(spec, [score])) is None:
        return {}
    rows, _, shares = means
    return {"held_out_rows": rows, **{name: _unit(spec, name) * share for name, share in shares.items()}}


def _means(spec: Spec, scores: Collection[tuple[float, ...]]) -> tuple[float, float, dict[str, float]] | None:
    """Rows, the standard deviation of the noise on their number, and each figure's mean over them, in [0, 1].

    None where the noise is as large as what it covers.
    """
    given = np.array(list(scores), np.float64)
    scale = math.sqrt(given.shape[1])
    sums = scale * given.sum(0)
    noise = scale * spec.federated_evaluation.noise_multiplier * math.sqrt(len(scores)) if spec.privacy.enabled else 0.0
    rows = float(sums[0])
    if rows < max(1.0, _LEAST_SIGNAL * noise):
        return None
    names = ("accuracy", "loss", "personalised_accuracy", "personalised_loss")
    return rows, noise, dict(zip(names, np.clip(sums[1:] / rows, 0.0, 1.0).tolist(), strict=False))


def _unit(spec: Spec, name: str) -> float:
    return largest_loss(spec) if name.endswith("loss") else 1.0
