"""Random layers in each round, after LISA (Pan et al., NeurIPS 2024, arXiv 2403.17919), on low-rank pairs."""

from dataclasses import dataclass, replace

import numpy as np

from fedloom.core.errors import ConfigError
from fedloom.core.schema import Role, Schema, Tensors
from fedloom.strategies.api import Plan, State, Strategy, Traits, Update
from fedloom.strategies.transforms.average import Sum, apply_mean_delta, begin, fold, trained

__all__ = ["LayerSampling"]


@dataclass(frozen=True)
class LayerSampling(Strategy):
    """Train B of a few layers, drawn anew for each round from the run's seed, and the head; the rest is frozen.

    A rests throughout, so every average is exact as under ffa, and an upload is as small as its layers. The paper draws
    whole layers of one model and never freezes the embedding and the head.

    Args:
        layers: Low-rank pairs trained in a round, at least 1; all if there are fewer.
        train_head: Whether the head is trained, in every round; it is broadcast either way.
    """

    layers: int = 2
    train_head: bool = True

    def __post_init__(self) -> None:
        """Refuse a round without layers."""
        if self.layers < 1:
            raise ConfigError(f"layers is {self.layers}; set a number of layers from 1 up")

    @property
    def traits(self) -> Traits:
        """Every client has the same plan; the tensors change from round to round."""
        return Traits(linear=True)

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The starting adapter; refuses one without pairs."""
        trained(schema, [Role.LORA_B], head=self.train_head)
        return begin(schema, adapter, seed)

    def plan(self, state: State, round: int, client: str) -> Plan:
        """The drawn tensors, by name."""
        return Plan(train=state.schema.words(self._drawn(state).names()), broadcast=state.adapter)

    def fold(self, state: State, acc: Sum | None, update: Update) -> Sum:
        """Add one weighted update of those tensors."""
        return fold(self._drawn(state), acc, update)

    def commit(self, state: State, acc: Sum | None) -> State:
        """Move them by the mean change."""
        return replace(state, adapter=apply_mean_delta(state.adapter, acc), round=state.round + 1)

    def _drawn(self, state: State) -> Schema:
        candidates, draw = [pair.b for pair in state.schema.pairs], np.random.Philox(key=[state.seed, state.round])
        rest = np.random.Generator(draw).permutation(candidates)[self.layers :]
        return trained(state.schema, [Role.LORA_B], head=self.train_head).select(state.schema.roles, but=rest.tolist())
