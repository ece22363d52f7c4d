"""No strategy forms a product of two factors: a round takes far less memory than one dense layer."""

import tracemalloc

import numpy as np
import pytest

from fedloom.core.registry import build, entries
from fedloom.core.schema import Role, Schema, Start, TensorSpec
from fedloom.strategies.api import Strategy
from fedloom.strategies.conformance import respond, run_round
from fedloom.strategies.start import starting_adapter

WIDTH, RANK = 4096, 2
SCHEMA = Schema(
    (
        TensorSpec("m.lora_A", "m", Role.LORA_A, (RANK, WIDTH)),
        TensorSpec("m.lora_B", "m", Role.LORA_B, (WIDTH, RANK)),
        TensorSpec("classifier.weight", "classifier", Role.HEAD, (2, 4)),
    )
)
TWO_PAIRS = Schema(
    tuple(
        TensorSpec(f"m.{role}_{factor}", "m", role, shape, start, axis)
        for role in ("shared", "own")
        for factor, shape, start, axis in (
            ("A", (RANK, WIDTH), Start.KAIMING, 0),
            ("B", (WIDTH, RANK), Start.ZERO, 1),
        )
    )
)


def _peak_of_two_rounds(strategy: Strategy, schema: Schema) -> int:
    state = strategy.init(schema, starting_adapter(schema, 1), 1)
    clients = [f"client-{index}" for index in range(max(3, strategy.traits.least_updates))]
    tracemalloc.start()
    try:
        for _ in range(2):
            updates = [
                respond(schema, strategy.plan(state, state.round, client), client, index)
                for index, client in enumerate(clients)
            ]
            state = run_round(strategy, state, updates)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", list(entries("strategies")))
def test_a_round_takes_less_than_a_tenth_of_a_dense_layer(name: str) -> None:
    strategy: Strategy = build("strategies", name, {"train_head": True})

    schema = TWO_PAIRS if name == "feddpa" else SCHEMA
    assert _peak_of_two_rounds(strategy, schema) < WIDTH * WIDTH * 4 / 10


def test_a_product_would_be_seen() -> None:
    strategy: Strategy = build("strategies", "fedavg", {"train_head": True})
    tracemalloc.start()
    state = strategy.init(SCHEMA, starting_adapter(SCHEMA, 1), 1)
    product = state.adapter["m.lora_B"] @ state.adapter["m.lora_A"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert product.nbytes == np.prod(product.shape) * 4
    assert peak > WIDTH * WIDTH * 4
