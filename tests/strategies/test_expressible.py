"""Methods that fedloom does not ship, written against the unchanged interface: docs/strategies.md relies on these."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from fedloom.core.schema import LORA, Array, Schema, Tensors
from fedloom.strategies.api import Plan, State, Strategy, Traits, Update
from fedloom.strategies.conformance import StrategyConformance, effective, respond, run_round
from fedloom.strategies.lowrank import refactorize
from fedloom.strategies.transforms.average import Average, Sum, apply_mean_delta, begin, check, fold, select

Kept = tuple[Update, ...]


def _corrected(schema: Schema, memory: Tensors, stacks: dict[str, tuple[Array, Array]]) -> dict[str, Array]:
    """The old correction plus the stacked factors, at the smallest rank that loses nothing in any module."""
    exact = {}
    for module, (b, a) in stacks.items():
        if f"{module}.base_A" in memory:
            b = np.concatenate([memory[f"{module}.base_B"], b], axis=1)
            a = np.concatenate([memory[f"{module}.base_A"], a])
        exact[module] = refactorize(b, a)
    rank = max(min(b.shape[0], *a.shape) for b, a in exact.values())
    out = {}
    for module, (b, a) in exact.items():
        out[f"{module}.base_A"] = np.zeros((rank, a.shape[1]), np.float32)
        out[f"{module}.base_B"] = np.zeros((b.shape[0], rank), np.float32)
        kept = min(rank, len(a))
        out[f"{module}.base_A"][:kept] = a[:kept]
        out[f"{module}.base_B"][:, :kept] = b[:, :kept]
    return out


@dataclass(frozen=True)
class FedEx(Strategy):
    """FedEx-LoRA (arXiv 2410.09432): average the factors, and put what that misses into the frozen weight."""

    traits: ClassVar[Traits] = Traits(same_tensors=True, keeps_updates=True)

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        return begin(schema, adapter, seed)

    def plan(self, state: State, round: int, client: str) -> Plan:
        return Plan(train=state.schema.roles, broadcast={**state.adapter, **state.memory})

    def fold(self, state: State, acc: tuple[Sum, Kept] | None, update: Update) -> tuple[Sum, Kept]:
        total, kept = acc or (None, ())
        return fold(state.schema, total, update), (*kept, update)

    def commit(self, state: State, acc: tuple[Sum, Kept]) -> State:
        total, kept = acc
        adapter = apply_mean_delta(state.adapter, total)
        stacks = {}
        for pair in state.schema.pairs:
            shares = [update.weight / total.weight for update in kept]
            bs = [p * u.value(pair.b) for p, u in zip(shares, kept, strict=True)]
            b = np.concatenate([*bs, -adapter[pair.b]], axis=1)
            a = np.concatenate([*(u.value(pair.a) for u in kept), adapter[pair.a]])
            stacks[pair.module] = b, a
        memory = _corrected(state.schema, state.memory, stacks)
        return replace(state, adapter=adapter, memory=memory, round=state.round + 1)


class TestFedEx(StrategyConformance):
    def strategy(self) -> FedEx:
        return FedEx()

    def test_the_model_is_the_mean_of_the_clients_models(self) -> None:
        strategy, state = self.begin()
        for _ in range(4):
            updates = self.updates(strategy, state)
            values = [{**u.start, **{n: u.value(n) for n in u.delta}} for u in updates]
            models = [effective(state.schema, each) for each in values]
            shares = np.array([u.weight for u in updates]) / sum(u.weight for u in updates)

            state = run_round(strategy, state, updates)

            for name, tensor in effective(state.schema, {**state.adapter, **state.memory}).items():
                expected = np.tensordot(shares, np.stack([model[name] for model in models]), axes=1)
                np.testing.assert_allclose(tensor, expected, atol=1e-5)
        # Cumulative, yet never of more rank than the weight has: min(4, 7) and min(6, 5).
        ranks = {t.shape[0] for name, t in state.memory.items() if name.endswith("base_A")}
        assert ranks == {5}


@dataclass(frozen=True)
class FlexLoRA(Strategy):
    """FlexLoRA (arXiv 2402.11505): every client its own rank, cut from the SVD of the mean product."""

    traits: ClassVar[Traits] = Traits(same_tensors=True, keeps_updates=True, rewrites=True)
    ranks: tuple[tuple[str, int], ...]

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        return begin(schema, adapter, seed)

    def plan(self, state: State, round: int, client: str) -> Plan:
        rank = dict(self.ranks)[client]
        specs = state.schema.with_rank(rank).tensors
        cut = {spec.name: state.adapter[spec.name][tuple(map(slice, spec.shape))] for spec in specs}
        return Plan(train=LORA, broadcast=cut, rank=rank)

    def fold(self, state: State, acc: Kept | None, update: Update) -> Kept:
        check(state.schema.with_rank(dict(self.ranks)[update.client]), update)
        return (*(acc or ()), update)

    def commit(self, state: State, acc: Kept) -> State:
        adapter = dict(state.adapter)
        total = sum(update.weight for update in acc)
        for pair in state.schema.pairs:
            bs, rows = [u.weight / total * u.value(pair.b) for u in acc], [u.value(pair.a) for u in acc]
            b, a = refactorize(np.concatenate(bs, axis=1), np.concatenate(rows))
            rank = adapter[pair.a].shape[0]
            adapter[pair.b], adapter[pair.a] = b[:, :rank].astype(np.float32), a[:rank].astype(np.float32)
        return replace(state, adapter=adapter, round=state.round + 1)


def test_ranks_differ_by_client_and_only_the_tail_of_the_mean_is_lost() -> None:
    schema = TestFedEx().schema().select(LORA)
    strategy = FlexLoRA(ranks=(("ada", 1), ("bo", 2), ("cy", 3)))
    draw = np.random.Generator(np.random.Philox(key=[8, 8]))
    start = {n: draw.normal(size=t.shape).astype(np.float32) for n, t in schema.zeros().items()}
    state = strategy.init(schema, start, 0)
    plans = {name: strategy.plan(state, 0, name) for name, _ in strategy.ranks}
    updates = [respond(schema, plan, name, k) for k, (name, plan) in enumerate(plans.items())]
    total = sum(u.weight for u in updates)

    after = run_round(strategy, state, updates).adapter

    for pair in schema.pairs:
        terms = np.stack([u.weight / total * u.value(pair.b) @ u.value(pair.a) for u in updates])
        product = terms.sum(axis=0)
        lost = np.linalg.norm(product - after[pair.b].astype(np.float64) @ after[pair.a])
        tail = np.linalg.svd(product, compute_uv=False)[3:]
        assert lost == pytest.approx(np.linalg.norm(tail), abs=1e-5)
        assert lost > 0.01
    assert plans["ada"].broadcast[schema.pairs[0].a].shape == (1, 5)


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
