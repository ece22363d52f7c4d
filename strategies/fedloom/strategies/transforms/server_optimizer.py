"""FedOpt (Reddi et al., ICLR 2021, arXiv 2003.00295) and FedAvgM (Hsu et al., 2019, arXiv 1909.06335)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from fedloom.core.errors import ConfigError
from fedloom.core.schema import Array, Schema
from fedloom.strategies.api import State, Strategy, Traits, Update
from fedloom.strategies.transforms.average import Sum, fold, mean, uploaded
from fedloom.strategies.transforms.transform import Transform

__all__ = ["FIRST_MOMENT", "Optimizer", "ServerOptimizer"]

Float64 = npt.NDArray[np.float64]
Optimizer = Literal["momentum", "adagrad", "adam", "yogi"]

FIRST_MOMENT = "server_optimizer/first/"
"""What stands before a tensor's name where `memory` holds its first moment."""
_SECOND = "server_optimizer/second/"
_ANYONE = ""
"""The client whose plan everybody gets: the inner strategy is linear, so its plan does not depend on it."""
_SECOND_MOMENT: dict[str, Callable[[Float64, Float64, float], Float64]] = {
    "adagrad": lambda v, squared, beta2: v + squared,
    "adam": lambda v, squared, beta2: beta2 * v + (1 - beta2) * squared,
    "yogi": lambda v, squared, beta2: v - (1 - beta2) * squared * np.sign(v - squared),
}


@dataclass(frozen=True)
class ServerOptimizer(Transform):
    """Take the mean change of a round as a gradient, and move the adapter by an optimizer's step.

    With D the weighted mean change of a tensor (algorithm 2 of Reddi et al., without bias correction):

    - "adagrad", "adam" and "yogi": m <- beta1 m + (1 - beta1) D, then v <- v + D^2, beta2 v + (1 - beta2) D^2 or
      v - (1 - beta2) D^2 sign(v - D^2), and w <- w + learning_rate m / (sqrt(v) + tau). m begins at 0, v at tau^2.
    - "momentum" (FedAvgM): m <- beta1 m + D and w <- w + learning_rate m.

    The step is the inner strategy's one update, so that what it does after its mean follows. Moments are float64, one
    or two values for each one that is trained, and are made of what clients have already noised: they cost no privacy.
    A tensor that a round does not train keeps its moments as they are.

    Steps are by coordinates. They mean what they say on biases, heads and the B of a shared A, and are a heuristic
    where both factors of a pair are trained, since (B G^-1, G A) is the same model.

    Args:
        inner: A linear strategy that keeps its coordinates, without a server optimizer of its own.
        name: One of the four.
        learning_rate: Of the server, positive; 1 with momentum and beta1 = 0 is the inner strategy itself.
        beta1: Decay of the first moment, in [0, 1). Reddi et al. take 0.9, and 0 for Adagrad.
        beta2: Decay of the second moment, in [0, 1); momentum and Adagrad have none.
        tau: What is added to sqrt(v), positive; it bounds how far small changes are blown up.

    Raises:
        ConfigError: The name is unknown, a number is out of range, or the inner strategy will not do.
    """

    inner: Strategy
    name: Optimizer
    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        who, traits = type(self.inner).__name__, self.inner.traits
        if self.name not in get_args(Optimizer):
            raise ConfigError(f"server optimizer is {self.name!r}; choose one of {', '.join(get_args(Optimizer))}")
        if not (0 < self.learning_rate < np.inf and 0 < self.tau < np.inf):
            raise ConfigError(
                f"server optimizer with learning rate {self.learning_rate} and tau {self.tau}; both must be positive"
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(f"server optimizer with betas {self.beta1} and {self.beta2}; both must lie in [0, 1)")
        if not traits.linear:
            raise ConfigError(
                f"strategy {who} does not declare the trait linear; a server optimizer hands it one step in place of "
                "the mean. Put the optimizer inside, and what looks at single updates around it"
            )
        if traits.rewrites:
            raise ConfigError(
                f"strategy {who} rewrites its coordinates, and moments of the old ones belong to other directions; "
                "choose fedavg, ffa or fedpeft, or fedsvd with its option server_momentum"
            )
        if traits.moments:
            raise ConfigError(f"strategy {who} has a server optimizer already; leave one out")

    @property
    def traits(self) -> Traits:
        """The inner strategy's, and that there are moments."""
        return replace(self.inner.traits, moments=True, linear_moments=self.name == "momentum")

    def fold(self, state: State, acc: Sum | None, update: Update) -> Sum:
        """Add one weighted update, see `average.fold`.

        Raises:
            SchemaError: A tensor is missing, unexpected or of another shape.
            UpdateRejected: The change or the weight is not usable.
        """
        return fold(self._uploaded(state), acc, update)

    def commit(self, state: State, acc: Sum | None) -> State:
        """Let the inner strategy commit the step, and remember the moments.

        Raises:
            ProtocolError: No update was folded.
        """
        moments: dict[str, Array] = {}
        step: dict[str, Array] = {}
        for name, change in mean(acc).items():
            first = state.memory.get(FIRST_MOMENT + name, np.zeros(change.shape))
            if self.name == "momentum":
                first = self.beta1 * first + change
                step[name] = self.learning_rate * first
            else:
                first = self.beta1 * first + (1 - self.beta1) * change
                second = state.memory.get(_SECOND + name, np.full(change.shape, self.tau**2))
                second = _SECOND_MOMENT[self.name](second.astype(np.float64), change**2, self.beta2)
                step[name] = self.learning_rate * first / (np.sqrt(second) + self.tau)
                moments[_SECOND + name] = second
            moments[FIRST_MOMENT + name] = first
        start = self.inner.plan(state, state.round, _ANYONE).broadcast
        one = Update(f"step of {self.name}", 1.0, start, {n: each.astype(np.float32) for n, each in step.items()})
        after = self.inner.commit(state, self.inner.fold(state, None, one))
        return replace(after, memory={**after.memory, **moments})

    def _uploaded(self, state: State) -> Schema:
        return uploaded(state.schema, self.inner.plan(state, state.round, _ANYONE))
