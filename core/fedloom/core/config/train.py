"""[train]: local training."""

from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from fedloom.core.config.parsing import OpenSection
from fedloom.core.limits import MAX_ROUNDS

__all__ = ["TrainSection"]


class TrainSection(OpenSection):
    """[train]: local training on each client in each round. Other keys are options of the optimiser."""

    component: ClassVar[tuple[str, str]] = ("optimizers", "optimizer")
    steps: int = Field(ge=1, le=100_000)
    """Optimiser steps per round: public, the same for every client."""
    sampling_rate: float = Field(ge=1e-9, le=1)
    """Poisson rate q: each step includes each example with this probability. Public."""
    optimizer: str = "sgd"
    """Name of an installed local optimiser, see `fedloom components list optimizers`; its state starts anew each
    round."""
    learning_rate: float = Field(default=1.0, ge=1e-9, le=1e4)
    """Local learning rate. With SGD the mean gradient of a step has norm at most clip_norm; Adam needs far less."""
    head_learning_rate: float | None = Field(default=None, ge=1e-9, le=1e4)
    """Learning rate of the head alone; None is learning_rate. A fresh head often needs a larger one."""
    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = "constant"
    """How both learning rates go from round to round. linear: they fall by equal steps from the first round's to the
    last's, which is 1/rounds of it. cosine: along half a cosine. one-cycle: up from a 25th over the warm-up, then down,
    along half a cosine each."""
    warmup: int = Field(default=0, ge=0, lt=MAX_ROUNDS)
    """Rounds before the one that has the whole learning rate. In them it rises on a line, and in those of one-cycle,
    which needs some, along half a cosine."""
    momentum: float = Field(default=0.0, ge=0, le=0.9999)
    """Momentum of the optimisers that have one: sgd, muon, spectrum."""
    proximal_mu: float = Field(default=0.0, ge=0, le=1e4)
    """FedProx: mu/2 times the squared distance to the broadcast adapter is added to the loss."""
    ema: float = Field(default=0.0, ge=0, le=0.9999)
    """Decay of the exponential mean over the values after each step of a round, which is sent in place of the last; 0
    sends the last."""
    microbatch: int = Field(default=64, ge=1, le=1024)
    """Most examples in one forward pass; a client with less memory takes fewer. Only memory and speed depend on it."""

    @model_serializer(mode="wrap")
    def _without_what_is_new(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As in [model]: builds that know no such keys are told and have stored none."""
        found: dict[str, Any] = plain(self)
        return {key: value for key, value in found.items() if key not in ("warmup", "ema") or value}
