"""What the laws are tried on: a strategy, an adapter, clients and their updates."""

import numpy as np

from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.strategies.api import Plan, State, Strategy, Update
from fedloom.strategies.conformance.drive import CLIENTS, respond
from fedloom.strategies.start import starting_adapter

__all__ = ["Battery"]


class Battery:
    """Define `strategy`; define `schema` only for a method that needs another adapter."""

    def strategy(self) -> Strategy:
        """A fresh instance of the strategy under test."""
        raise NotImplementedError("define strategy() in the subclass and return the strategy under test")

    def schema(self) -> Schema:
        """Two low-rank pairs of unequal shape and a head with a bias; rank 3, scale 2."""
        specs: list[TensorSpec] = []
        for module, out, inner in (("layer.0.query", 6, 5), ("layer.0.value", 4, 7)):
            specs.append(TensorSpec(f"{module}.lora_A", module, Role.LORA_A, (3, inner)))
            specs.append(TensorSpec(f"{module}.lora_B", module, Role.LORA_B, (out, 3)))
        specs.append(TensorSpec("classifier.weight", "classifier", Role.HEAD, (3, 4)))
        specs.append(TensorSpec("classifier.bias", "classifier", Role.HEAD, (3,)))
        return Schema(tuple(specs), scale=2.0)

    def respond(self, schema: Schema, plan: Plan, client: str, stream: int) -> Update:
        """What a client sends, see the function `respond`; override it for a method that is choosy about weights."""
        return respond(schema, plan, client, stream)

    def begin(self) -> tuple[Strategy, State]:
        """A strategy and a state whose every tensor is away from zero, so that no law holds trivially."""
        strategy, schema = self.strategy(), self.schema()
        draw = np.random.Generator(np.random.Philox(key=[5, 99]))
        drawn = starting_adapter(schema, 5)
        adapter = {n: each + draw.normal(0, 0.3, each.shape).astype(np.float32) for n, each in drawn.items()}
        return strategy, strategy.init(schema, adapter, 5)

    def updates(self, strategy: Strategy, state: State) -> list[Update]:
        """One update of every client, in client order, different in every round."""
        clients = self.clients(strategy)
        plans = [strategy.plan(state, state.round, client) for client in clients]
        return [
            self.respond(state.schema, plan, client, 10 * state.round + index)
            for index, (client, plan) in enumerate(zip(clients, plans, strict=True))
        ]

    def clients(self, strategy: Strategy) -> tuple[str, ...]:
        """Names in canonical order: three, or as many as the strategy needs."""
        more = range(strategy.traits.least_updates - len(CLIENTS))
        return CLIENTS + tuple(f"dee-{index:03d}" for index in more)
