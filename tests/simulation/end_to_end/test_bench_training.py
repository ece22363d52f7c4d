"""The benchmarks of simulated training, at a small size."""

import math

import pytest

from fedloom.simulation.benchmarks.population import bench_population
from fedloom.simulation.benchmarks.training import Work, bench_training

SMALL = Work(clients=2, steps=1, batch=2, length=8)


@pytest.mark.slow
@pytest.mark.e2e
def test_every_variant_of_a_round_is_timed_beside_the_bare_loop() -> None:
    found = bench_training(SMALL, repeats=1)

    ratios = {name: value for name, value in found.items() if "ratio" in name}
    assert len(ratios) == 5
    assert all(0 < value < math.inf for value in ratios.values()), ratios
    assert found["ratio_to_bare_loop"] == pytest.approx(found["open_ms"] / found["bare_ms"])
    assert found["private_ratio_cached"] == pytest.approx(found["private_last_ms"] / found["open_last_ms"])
    assert (found["clients"], found["steps"], found["batch"], found["length"]) == (2, 1, 2, 8)


@pytest.mark.slow
@pytest.mark.e2e
def test_memory_hardly_grows_with_the_number_of_clients() -> None:
    work = Work(clients=20, steps=1, batch=1, length=8, private=True)
    found = bench_population(work, rounds=1, threads=1)

    assert found["clients_per_s"] > 0
    assert found["peak_mib"] > 100, "it has a model"
    assert 0.9 < found["memory_ratio"] < 1.1
