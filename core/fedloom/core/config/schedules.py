"""How the learning rate goes from round to round: one rate for all steps of a round.

A round is the unit because the optimiser's state starts anew in each, and because the average of a round's updates is
the step that the federation takes: a rate that fell within every round would make a saw of the run, and the first
steps of a round are no more trustworthy than its last.
"""

import math

from fedloom.core.config.train import TrainSection

__all__ = ["learning_rates", "share_of_rate"]

_LOWEST, _LAST = 1 / 25, 1 / 25e4
"""Where a one-cycle schedule starts, and where it would be after its last round, as torch has it."""


def learning_rates(train: TrainSection, round: int, rounds: int) -> tuple[float, float]:
    """The rates of a round's steps: that of the adapter, and that of the head.

    Args:
        train: [train], with what an assignment overrides.
        round: Counted from 0.
        rounds: Of the whole run.
    """
    left = share_of_rate(train, round, rounds)
    return left * train.learning_rate, left * (train.head_learning_rate or train.learning_rate)


def share_of_rate(train: TrainSection, round: int, rounds: int) -> float:
    """What of the run file's learning rates a round is trained at, above 0 and at most 1.

    With w rounds of warm-up and p = (round - w) / (rounds - w):

    - Before round w: (round + 1) / (w + 1), on a line to the whole rate.
    - "constant": 1.
    - "linear": 1 - p.
    - "cosine": (1 + cos(pi p)) / 2 (Loshchilov and Hutter, 1608.03983, without restarts).
    - "one-cycle" (Smith and Topin, 1708.07120): half a cosine from 1/25 up to round w, and from there half a cosine
      down. The momentum stays.

    The zero that each of the last three comes to would be round number `rounds`, which is not trained: a round at no
    rate would be paid for in privacy and move nothing.

    Args:
        train: Names the schedule and w, which is below `rounds`.
        round: Counted from 0.
        rounds: Of the whole run.
    """
    warmup = train.warmup
    progress = (round - warmup) / (rounds - warmup)
    if train.schedule == "one-cycle":
        return _between(_LOWEST, 1, round / warmup) if round < warmup else _between(1, _LAST, progress)
    if round < warmup:
        return (round + 1) / (warmup + 1)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": _between(1, 0, progress)}[train.schedule]


def _between(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
