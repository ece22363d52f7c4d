"""FedDyn (Acar et al., ICLR 2021, arXiv 2111.04263)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedloom.core.errors import ConfigError
from fedloom.core.registry import build
from fedloom.core.schema import Array
from fedloom.strategies.api import Plan, State, Strategy, Traits, Update
from fedloom.strategies.drift.client_gradients import ClientGradients, Taken, mean_gradient
from fedloom.strategies.transforms.average import uploaded
from fedloom.strategies.transforms.transform import Composed

__all__ = ["DynamicRegularizer", "FedDyn"]


@dataclass(frozen=True)
class DynamicRegularizer(ClientGradients):
    """Clients minimise L_k(w) - <g_k, w> + alpha/2 |w - w_t|^2, and the coordinator takes h / alpha off their mean.

    Args:
        inner: A linear strategy without moments that trains the same tensors in every round and keeps their
            coordinates.
        alpha: Weight of the regularizer, which takes the place of train.proximal_mu; above 0, at most 1e4.

    Raises:
        ConfigError: The inner strategy will not do, or alpha is out of range.
    """

    inner: Strategy
    alpha: float

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        super().__post_init__()
        if self.inner.traits.moments:
            raise ConfigError(
                f"strategy {type(self.inner).__name__} has a server optimizer, and FedDyn's own correction makes up "
                "for the mean of the clients alone; choose ffa, fedavg or fedpeft"
            )
        if not 0 < self.alpha <= 1e4:
            raise ConfigError(f"FedDyn with alpha = {self.alpha!r}; above 0 and at most 1e4 is allowed, such as 0.1")

    @property
    def traits(self) -> Traits:
        """As for all remembered gradients, whose mean moves the adapter here."""
        return replace(super().traits, moments=True)

    def plan(self, state: State, round: int, client: str) -> Plan:
        """The inner strategy's plan, with the regularizer and the client's own term."""
        plan = super().plan(state, round, client)
        return replace(plan, local={**plan.local, "proximal_mu": self.alpha})

    def linear(self, own: Array, mean: Array) -> Array:
        """-g_k."""
        return -own

    def step(self, update: Update) -> Mapping[str, float]:
        """Alpha."""
        return dict.fromkeys(update.delta, self.alpha)

    def commit(self, state: State, acc: Taken | None) -> State:
        """The inner strategy's mean, less h / alpha.

        Raises:
            ProtocolError: No update was folded.
        """
        after = super().commit(state, acc)
        h = mean_gradient(after, uploaded(state.schema, self.inner.plan(state, state.round, "")))
        moved = {name: (after.adapter[name] - each / self.alpha).astype(np.float32) for name, each in h.items()}
        return replace(after, adapter={**after.adapter, **moved})


@dataclass(frozen=True)
class FedDyn(Composed):
    """Regularize every client by what it learnt before, so that its own optimum moves to the common one.

    The client's part is a linear term and FedProx's pull; g_k <- g_k - alpha (w_k - w_t), h the mean of all g_k, and
    w <- sum_k p_k w_k - h / alpha (algorithm 1). The coordinator keeps the g_k, which are functions of what clients
    send: a site keeps nothing, and a broadcast is twice as large and each client's own. The paper divides h by the
    number of all devices; here they are those that took part so far, so h is larger in the first rounds of a run
    whose clients come one after another.

    Any local optimiser will do: at the end g_k is the client's gradient at the common optimum whatever steps led there.
    What acts on single updates or hides them (robust rules, the norm bound, buffered rounds, secure aggregation,
    user-level privacy) is refused.

    The means are exact for biases, heads, and B over a shared A. On both factors of a pair (`inner = "fedavg"`) they
    are a heuristic, since (B G^-1, G A) is the same model.

    In a private run g_k is made of noised changes, and the term and the pull join the steps after clipping and noise:
    they cost no privacy. A client's noise adds up in g_k from round to round, damped by the pull.

    Args:
        alpha: Weight of the regularizer in place of train.proximal_mu, above 0 and at most 1e4; the paper takes 0.1,
            0.01 and 0.001.
        inner: Name of the linear strategy that plans and averages; with its default options.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: alpha is out of range, or the inner strategy is not linear, rewrites its coordinates, changes
            tensors from round to round or has a server optimizer.
    """

    alpha: float = 0.1
    inner: str = "ffa"
    train_head: bool = True

    def build(self) -> Strategy:
        """The regularizer around the average."""
        return DynamicRegularizer(build("strategies", self.inner, {"train_head": self.train_head}), self.alpha)
