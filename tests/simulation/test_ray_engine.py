"""What the Ray engine decides without Ray: whose turn it is, what is paid for, how many actors fit, what is missing."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from fedloom.core.config.run import EngineSection, RunConfig
from fedloom.core.errors import ConfigError, PolicyError
from fedloom.core.privacy.accounting import Spend
from fedloom.simulation.ray_engine import cluster
from fedloom.simulation.ray_engine.actor import Footprint, Receipt
from fedloom.simulation.ray_engine.turns import Turns
from fedloom.simulation.simulate import simulate
from tests.support.runs import tiny_run

SPEND = Spend(0.1, 2.0, 3)


def order(turns: Turns, count: int) -> list[str | None]:
    return [turns.take() for _ in range(count)]


def test_the_largest_comes_first_and_later_the_slowest() -> None:
    turns = Turns({"a": 10, "b": 30, "c": 20})
    assert order(turns, 3) == ["b", "c", "a"]

    for name, seconds in (("a", 9.0), ("b", 1.0), ("c", 2.0)):
        turns.give(name, done=False, waits=True, seconds=seconds)
    turns.stir()

    assert order(turns, 3) == ["a", "c", "b"]


def test_one_that_is_not_known_yet_is_taken_to_be_as_fast_as_the_others() -> None:
    turns = Turns({"a": 10, "b": 40, "c": 12})
    order(turns, 3)
    turns.give("a", done=False, waits=True, seconds=5.0)
    turns.give("b", done=False, waits=True, seconds=None)
    turns.give("c", done=False, waits=True, seconds=25.0)
    turns.stir()

    assert order(turns, 3) == ["b", "c", "a"], "at 30 s for 22 examples the one of 40 takes 55 s"


def test_who_waits_is_asked_again_when_something_happens_also_during_its_turn() -> None:
    turns = Turns({"a": 2, "b": 1})
    assert order(turns, 2) == ["a", "b"]
    turns.give("a", done=False, waits=True, seconds=None)
    turns.stir()  # while b has its turn
    turns.give("b", done=False, waits=True, seconds=None)

    assert order(turns, 2) == ["a", "b"]
    turns.give("a", done=False, waits=False, seconds=None)
    assert turns.take() == "a", "it has worked, and may have more to do"


def test_turns_end_when_all_are_done_or_one_has_failed() -> None:
    turns = Turns({"a": 1})
    assert turns.goes_on(0.0)
    turns.take()
    seen: list[str | None] = []
    waiting = threading.Thread(target=lambda: seen.append(turns.take()))
    waiting.start()
    turns.give("a", done=True, waits=False, seconds=1.0)
    waiting.join(10)
    assert seen == [None]
    assert not turns.goes_on(0.0)

    turns = Turns({"a": 1})
    turns.fail(ValueError("first"))
    turns.fail(ValueError("second"))
    assert turns.take() is None
    with pytest.raises(ValueError, match="first"):
        turns.goes_on(0.0)


def test_a_receipt_pays_for_what_was_charged_and_for_nothing_else() -> None:
    receipt = Receipt("run", 4, SPEND, None, 7)

    def reserve(run: str, round: int, spend: Spend, evaluation: Spend | None = None) -> int:
        return receipt.reserve(run, round, spend, evaluation=evaluation, budget=8.0, delta=1e-5)

    def reserve_result(run: str, rounds: int, spend: Spend) -> int:
        return receipt.reserve_result(run, rounds, spend, budget=8.0, delta=1e-5)

    assert reserve("run", 4, SPEND) == 7
    assert reserve("run", 4, SPEND) == 7, "work that is begun again"
    assert reserve_result("run", 4, SPEND) == 7
    assert receipt.evaluated("run", 4), "no evaluation is paid for, so there is to be none"
    for asked in (("run", 5, SPEND), ("other", 4, SPEND), ("run", 4, replace(SPEND, steps=4))):
        with pytest.raises(PolicyError, match="the driver has paid for"):
            reserve(*asked)
        with pytest.raises(PolicyError, match="the driver has paid for"):
            reserve_result(*asked)
    with pytest.raises(PolicyError, match="the driver has paid for"):
        reserve("run", 4, SPEND, evaluation=SPEND)


@pytest.mark.parametrize(("free", "more"), [(0, 0), (1000, 0), (1249, 0), (1250, 1), (12_500, 10)])
def test_as_many_actors_as_four_fifths_of_the_free_memory_hold(free: int, more: int) -> None:
    assert Footprint(peak=1000, free=free).more == more


@pytest.mark.parametrize("address", ["", "auto", "10.0.0.4:6379", "[::1]:6379"])
def test_addresses_are_of_nodes_and_not_of_ray_clients(address: str) -> None:
    assert EngineSection(kind="ray", address=address).address == address
    with pytest.raises(ConfigError, match="address"):
        EngineSection(kind="ray", address=f"ray://{address}")


def test_without_ray_nothing_is_loaded_or_written(
    tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    config: RunConfig = tiny_run(tiny_base, data={"source": str(data), "clients": 2}, engine={"kind": "ray"})

    with pytest.raises(ConfigError, match=r'pip install "fedloom\[ray\]"'):
        simulate(config, tmp_path / "runs")

    assert not (tmp_path / "runs").exists()
