"""Evaluation: on rows that whoever runs the federation has, and on rows that its clients hold out."""

import math
from typing import TYPE_CHECKING

from pydantic import Field

from fedloom.core.config.parsing import Section
from fedloom.core.limits import MAX_ROUNDS

if TYPE_CHECKING:
    from fedloom.core.config.run import Spec  # which holds these sections

__all__ = ["EvaluationSection", "FederatedEvaluationSection", "largest_loss"]

_LARGEST_TEXT_LOSS = 10.0
"""Loss in nats of guessing among the tokens of a usual vocabulary, which trained models do not come near."""


class EvaluationSection(Section):
    """[evaluation]: a held-out set that whoever runs the federation has."""

    every: int = Field(default=1, ge=1)
    """Evaluate after every so many rounds, and always after the last."""
    max_examples: int = Field(default=1000, ge=1)
    """Held-out examples used."""
    generate: int = Field(default=0, ge=0)
    """Of how many of these the model writes the answer at each evaluation, for figures such as rouge_l and wer. It
    takes as many forward passes as tokens. Tasks that write text only."""


class FederatedEvaluationSection(Section):
    """[federated_evaluation]: clients score the adapter on rows they hold out, and release sums over them."""

    enabled: bool = False
    """True asks for it; a client whose policy has no data.held_out refuses the run."""
    every: int = Field(default=1, ge=1, le=MAX_ROUNDS)
    """Evaluate in the first round and every so many rounds after it, before training, and the result at the end."""
    personalised: bool = False
    """Evaluate after training too: the adapter as this client's own steps leave it."""
    noise_multiplier: float = Field(default=10.0, ge=0.01, le=1000)
    """Noise standard deviation over the most that one row adds to the released sums, which is 1. Private runs only."""
    max_loss: float | None = Field(default=None, ge=1e-3, le=1e4)
    """Loss in nats at which a row's is cut; noise grows with it. None: twice that of guessing a label, 10 for texts."""

    def due(self, round: int) -> bool:
        """Whether clients evaluate in this round, counted from 0."""
        return self.enabled and round % self.every == 0

    @property
    def figures(self) -> int:
        """Numbers a client releases: how many rows; right answers and loss of them, once or twice."""
        return 5 if self.personalised else 3


def largest_loss(spec: "Spec") -> float:
    """Loss in nats at which that of one row is cut: what the run says, or else twice that of guessing."""
    if spec.federated_evaluation.max_loss is not None:
        return spec.federated_evaluation.max_loss
    labels = len(spec.model.labels)
    return 2 * math.log(labels) if labels > 1 else _LARGEST_TEXT_LOSS
