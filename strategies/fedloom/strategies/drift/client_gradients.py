"""A gradient of every client, read off its last change, and the mean of them all."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedloom.core.errors import ConfigError
from fedloom.core.schema import Array, Schema, Tensors
from fedloom.strategies.api import Plan, State, Traits, Update
from fedloom.strategies.transforms.average import check, uploaded
from fedloom.strategies.transforms.transform import Transform

__all__ = ["LARGEST", "ClientGradients", "Taken", "mean_gradient"]

Float64 = npt.NDArray[np.float64]

LARGEST = 50.0
"""Largest value of a gradient that is remembered; beyond it is cut. Norms of mean gradients are 0.1 to 100. The
difference of two stays within the 100 that a site's policy allows, so no client can make the others refuse the run."""

_PREFIX = "client_gradients/"
_OF, _WEIGHT, _MEAN = (_PREFIX + name for name in ("of/", "weight/", "mean"))
_ANYONE = ""
"""The client whose plan everybody gets, but for the term of its own: the inner strategy is linear."""


@dataclass(frozen=True)
class Taken:
    """What a round has given so far."""

    inner: Any
    """The inner strategy's accumulator."""
    gradients: dict[str, Array]
    """Of each client so far, all uploaded tensors as one float32 vector."""
    weights: dict[str, float]


class ClientGradients(Transform):
    """Another strategy, whose clients get a linear term l_k made of gradients that are remembered of all of them.

    After a round in which client k moved by d_k it is remembered by v_k <- -l_k - s d_k, with a step s of the
    subclass's, and v is the mean of all v_k by weight, also of those that sat the round out. l_k is what the client
    had, after the rounding of its broadcast. A client that never took part has no v_k and gets no term. `memory` keeps
    one float32 vector for each client, stored after every round, so that a run goes on after a crash as if there had
    been none.

    Subclasses are frozen dataclasses with a field `inner`.

    Raises:
        ConfigError: The inner strategy is not linear, trains other tensors in other rounds, or rewrites coordinates.
    """

    def __post_init__(self) -> None:
        """Refuse what a remembered gradient means nothing for."""
        who, traits = type(self.inner).__name__, self.inner.traits
        if not traits.linear:
            raise ConfigError(
                f"strategy {who} does not declare the trait linear; {type(self).__name__} gives its clients terms that "
                "only a mean cancels. Choose ffa, fedavg or fedpeft as the inner strategy"
            )
        if traits.rewrites or not traits.same_tensors:
            raise ConfigError(
                f"strategy {who} rewrites its coordinates or trains other tensors in other rounds, and the gradients "
                f"that {type(self).__name__} remembers belong to the old ones; choose ffa, fedavg or fedpeft"
            )

    @property
    def traits(self) -> Traits:
        """The inner strategy's, but that plans differ, and that every client is remembered."""
        return replace(self.inner.traits, linear=False, keeps_updates=True, remembers_clients=True)

    @abstractmethod
    def linear(self, own: Array, mean: Array) -> Array:
        """l_k of a client that took part before, from v_k and v."""

    @abstractmethod
    def step(self, update: Update) -> Mapping[str, float]:
        """S by tensor, positive."""

    def plan(self, state: State, round: int, client: str) -> Plan:
        """The inner strategy's plan, with the client's own term."""
        plan = self.inner.plan(state, round, _ANYONE)
        if _OF + client not in state.memory:
            return plan
        term = self.linear(state.memory[_OF + client], state.memory[_MEAN])
        return replace(plan, linear=_split(uploaded(state.schema, plan), term.astype(np.float32)))

    def fold(self, state: State, acc: Taken | None, update: Update) -> Taken:
        """Let the inner strategy fold the update, and note what it tells of the client's gradient.

        Raises:
            SchemaError: See the inner strategy.
            UpdateRejected: Likewise.
        """
        schema = uploaded(state.schema, self.inner.plan(state, state.round, _ANYONE))
        check(schema, update)
        acc = acc or Taken(None, {}, {})
        steps = self.step(update)
        told = [
            -steps[spec.name] * update.delta[spec.name].astype(np.float64) - update.linear.get(spec.name, 0.0)
            for spec in schema.tensors
        ]
        vector = np.concatenate([each.ravel() for each in told])
        acc.gradients[update.client] = np.clip(vector, -LARGEST, LARGEST).astype(np.float32)
        acc.weights[update.client] = update.weight
        return replace(acc, inner=self.inner.fold(state, acc.inner, update))

    def commit(self, state: State, acc: Taken | None) -> State:
        """What the inner strategy commits, and the gradients of the round's clients in the place of their old ones.

        Raises:
            ProtocolError: No update was folded.
        """
        taken = acc or Taken(None, {}, {})
        after = self.inner.commit(state, taken.inner)
        memory = dict(after.memory)
        memory |= {_OF + client: each for client, each in taken.gradients.items()}
        memory |= {_WEIGHT + client: np.array(each) for client, each in taken.weights.items()}
        memory[_MEAN] = _mean(memory)
        return replace(after, memory=memory)


def mean_gradient(state: State, schema: Schema) -> dict[str, Array]:
    """V by tensor, float64; `schema` is that of the uploaded tensors."""
    return _split(schema, state.memory[_MEAN])


def _mean(memory: Tensors) -> Float64:
    """The weighted mean over all clients, in the order of their names: the same bits whatever the order in memory."""
    clients = sorted(name.removeprefix(_OF) for name in memory if name.startswith(_OF))
    weights = np.array([float(memory[_WEIGHT + client]) for client in clients])
    total = np.zeros(memory[_OF + clients[0]].shape)
    for client, weight in zip(clients, weights, strict=True):
        total += weight * memory[_OF + client].astype(np.float64)
    mean: Float64 = total / weights.sum()
    return mean


def _split(schema: Schema, vector: Array) -> dict[str, Array]:
    """A vector of all tensors of `schema` as these tensors."""
    parts = np.split(vector, np.cumsum([spec.size for spec in schema.tensors])[:-1])
    return {spec.name: part.reshape(spec.shape) for spec, part in zip(schema.tensors, parts, strict=True)}
