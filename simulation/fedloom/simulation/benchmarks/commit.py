"""What a commit costs on the coordinator: factors against dense matrices, many layers, and memory by clients."""

import gc
import multiprocessing
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from fedloom.core.registry import build
from fedloom.core.runtime.memory import clear_peak, peak_bytes
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.strategies.api import State, Strategy, Update
from fedloom.strategies.start import starting_adapter

__all__ = ["bench_commit"]

_FEW, _MANY = 10, 200
_LAYERS_IN_MEMORY = 16


def bench_commit(*, strategy: str, width: int, rank: int, layers: int) -> dict[str, Any]:
    """Commit rounds of one strategy on square layers. Linux only, for the memory.

    Args:
        strategy: Name of a registered strategy, with its default options.
        width: Inputs and outputs of a layer, at least 2 * rank.
        rank: Of every pair.
        layers: Layers whose commit is timed.

    Returns:
        commit_layers_s: seconds of a commit of 4 updates over all layers, the best of three; commit_64_layers_s: the
        same for 64 layers, by proportion. dense_svd_s: one product of that width and its SVD, without anything else.
        speedup_vs_dense: that over one layer's part of the commit. rss_ratio_200_to_10_clients: how much more memory a
        round of 200 clients takes than one of 10, each in a process of its own, beyond what it had before the first
        update; 16 layers. keeps_updates: what the strategy declares of it.
    """
    made: Strategy = build("strategies", strategy, {"train_head": False})
    state = _begun(made, width, rank, layers)
    seconds = min(_commit_s(made, state) for _ in range(3))
    pair = state.schema.pairs[0]
    drawn = np.random.default_rng(1).normal(size=(width, rank))
    began_s = time.perf_counter()
    np.linalg.svd(drawn @ state.adapter[pair.a].astype(np.float64))
    dense_s = time.perf_counter() - began_s
    few, many = (_peak_bytes(strategy, width, rank, clients) for clients in (_FEW, _MANY))
    return {
        "commit_layers_s": seconds,
        "commit_64_layers_s": 64 * seconds / layers,
        "dense_svd_s": dense_s,
        "speedup_vs_dense": dense_s * layers / seconds,
        "rss_ratio_200_to_10_clients": many / few,
        "strategy": strategy,
        "keeps_updates": made.traits.keeps_updates,
        "width": width,
        "rank": rank,
        "layers": layers,
    }


def _begun(strategy: Strategy, width: int, rank: int, layers: int) -> State:
    specs: list[TensorSpec] = []
    for layer in range(layers):
        specs.append(TensorSpec(f"{layer}.lora_A", str(layer), Role.LORA_A, (rank, width)))
        specs.append(TensorSpec(f"{layer}.lora_B", str(layer), Role.LORA_B, (width, rank)))
    schema = Schema(tuple(specs))
    return strategy.init(schema, starting_adapter(schema, 0), 0)


def _updates(strategy: Strategy, state: State, clients: int) -> Iterator[Update]:
    """One update after the other, so that only what a strategy keeps is kept."""
    draw = np.random.default_rng(0)
    for number in range(clients):
        plan = strategy.plan(state, state.round, name := f"client-{number}")
        specs = state.schema.select(plan.train, but=plan.personal).tensors
        delta = {spec.name: draw.standard_normal(spec.shape, np.float32) for spec in specs}
        yield Update(name, 1.0, plan.broadcast, delta, linear=plan.linear, rate_sums=dict.fromkeys(delta, 1.0))


def _commit_s(strategy: Strategy, state: State) -> float:
    acc = None
    for update in _updates(strategy, state, max(4, strategy.traits.least_updates)):
        acc = strategy.fold(state, acc, update)
    began_s = time.perf_counter()
    strategy.commit(state, acc)
    return time.perf_counter() - began_s


def _peak_bytes(strategy: str, width: int, rank: int, clients: int) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_round_bytes, (strategy, width, rank, clients))


def _round_bytes(strategy: str, width: int, rank: int, clients: int) -> int:
    """Bytes by which this process's peak grows while it plays a round."""
    made: Strategy = build("strategies", strategy, {"train_head": False})
    state, acc = _begun(made, width, rank, _LAYERS_IN_MEMORY), None
    gc.collect()
    clear_peak()
    before = peak_bytes()
    for update in _updates(made, state, clients):
        acc = made.fold(state, acc, update)
    made.commit(state, acc)
    return peak_bytes() - before
