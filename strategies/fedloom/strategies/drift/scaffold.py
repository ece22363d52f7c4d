"""SCAFFOLD (Karimireddy et al., ICML 2020, arXiv 1910.06378)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedloom.core.errors import ConfigError
from fedloom.core.registry import build
from fedloom.core.schema import Array
from fedloom.strategies.api import Plan, State, Strategy, Traits, Update
from fedloom.strategies.drift.client_gradients import ClientGradients
from fedloom.strategies.transforms.transform import Composed

__all__ = ["SCAFFOLD", "ControlVariates"]


@dataclass(frozen=True)
class ControlVariates(ClientGradients):
    """Clients step along g - c_k + c: their own control variate out of the gradient, and the mean of all into it.

    c_k+ = c_k - c + (x - y_k) / (K eta), option II of algorithm 1, with each tensor's own learning rate: with plain SGD
    that is the mean of the gradients that the client had.

    Args:
        inner: A linear strategy that trains the same tensors in every round and keeps their coordinates.

    Raises:
        ConfigError: The inner strategy will not do.
    """

    inner: Strategy

    @property
    def traits(self) -> Traits:
        """As for all remembered gradients, which here are read off plain steps."""
        return replace(super().traits, plain_sgd=True)

    def plan(self, state: State, round: int, client: str) -> Plan:
        """The inner strategy's plan, with the client's own term.

        Raises:
            ConfigError: It changes the steps to other than plain ones.
        """
        plan = super().plan(state, round, client)
        if set(plan.local) - {"learning_rate"}:
            raise ConfigError(
                f"strategy {type(self.inner).__name__} sets {', '.join(sorted(plan.local))}, and control variates are "
                "read off plain SGD steps; choose ffa, fedavg or fedpeft"
            )
        return plan

    def linear(self, own: Array, mean: Array) -> Array:
        """C - c_k."""
        return mean - own

    def step(self, update: Update) -> Mapping[str, float]:
        """1 / (K eta)."""
        return {name: 1 / total for name, total in update.rate_sums.items()}


@dataclass(frozen=True)
class SCAFFOLD(Composed):
    """Correct every client's gradients by control variates, so that many local steps end at the common optimum.

    y <- y - eta (g(y) - c_k + c) on the client, x <- x + sum_k p_k (y_k - x), and c_k and c from what came (algorithm
    1 with option II). The coordinator keeps the c_k, since they are functions of what clients send: a site keeps
    nothing, and a broadcast is twice as large and each client's own. A client that comes new has c_k = c and no
    correction, which leaves c the mean of all; where all clients come in the first round this is the paper's algorithm
    with c_k = 0 at the start. A global step size other than 1 is `inner = "fedopt"`.

    Only plain SGD will do: any other step makes (x - y_k) / (K eta) something else than a mean gradient, so momentum,
    other optimisers, averaged iterates and FedProx's pull are refused. What acts on single updates or hides them
    (robust rules, the norm bound, buffered rounds, secure aggregation, user-level privacy) is refused as well.

    Control variates are exact for tensors whose mean is the model's: biases, heads, and B over a shared A. On both
    factors of a pair (`inner = "fedavg"`) they are a heuristic, since the average is.

    In a private run c_k is made of noised gradients and its term joins the steps after clipping and noise: it costs no
    privacy. The noise of a client's last round then moves each of its steps, and cancels in the mean of a round where
    all take part. The clipping's bias is a part of c_k.

    Args:
        inner: Name of the linear strategy that plans and averages; with its default options.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: The inner strategy is not linear, rewrites its coordinates or changes tensors from round to round.
    """

    inner: str = "ffa"
    train_head: bool = True

    def build(self) -> Strategy:
        """Control variates around the average."""
        return ControlVariates(build("strategies", self.inner, {"train_head": self.train_head}))
