"""Methods that fedloom does not ship, written against the unchanged interface: docs/strategies.md relies on these."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedloom.core.schema import LORA
from fedloom.strategies.api import State, Traits, Update
from fedloom.strategies.conformance import StrategyConformance, run_round
from fedloom.strategies.transforms.average import Average, Sum, select


@dataclass(frozen=True)
class LossWeighted(Average):
    """After q-FedAvg (arXiv 1905.10497): whom the adapter serves badly counts for more, by the power q of its loss."""

    traits: ClassVar[Traits] = Traits(same_tensors=True)
    q: float = 1.0

    def fold(self, state: State, acc: Sum | None, update: Update) -> Sum:
        loss = update.metrics.get("loss", 1.0)  # a round without an evaluation is a plain average
        return super().fold(state, acc, replace(update, weight=update.weight * loss**self.q))


class TestLossWeighted(StrategyConformance):
    def strategy(self) -> LossWeighted:
        return LossWeighted(select(*LORA))

    def test_clients_count_by_what_their_evaluation_released(self) -> None:
        strategy, state = self.begin()
        updates = [replace(each, weight=1.0) for each in self.updates(strategy, state)]
        losses = (0.5, 2.0, 1.0)
        told = [replace(u, metrics={"loss": each}) for u, each in zip(updates[:2], losses, strict=False)]

        after = run_round(strategy, state, [*told, replace(updates[2], metrics={})])

        for name, tensor in after.adapter.items():
            if name in updates[0].delta:
                moved = sum(loss * u.delta[name].astype(np.float64) for loss, u in zip(losses, updates, strict=True))
                np.testing.assert_allclose(tensor, state.adapter[name] + moved / 3.5, atol=1e-6)
