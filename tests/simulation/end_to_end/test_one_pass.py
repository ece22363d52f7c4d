"""Clients of one pass give what they give in turn, to float32 rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fedloom.client.training.one_pass.passes as module
from fedloom.core.config.run import EngineSection, RunConfig
from fedloom.core.errors import ConfigError, ModelError
from fedloom.core.schema import Tensors
from fedloom.simulation.in_process.workers import number_of_workers
from tests.simulation.end_to_end.test_workers import LORA, config_of, trained
from tests.support.engines import largest_difference


def shared(config: RunConfig, **engine: Any) -> RunConfig:
    return config.model_copy(update={"engine": config.engine.model_copy(update={"one_pass": True, **engine})})


def products(result: Tensors) -> Tensors:
    """Corrections of the base as their product, of which rounding may choose other factors."""
    pairs = [name.removesuffix(".base_A") for name in result if name.endswith(".base_A")]
    plain = {name: value for name, value in result.items() if not name.endswith((".base_A", ".base_B"))}
    return plain | {pair: result[f"{pair}.base_B"] @ result[f"{pair}.base_A"] for pair in pairs}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The rows of each client in every pass."""
    found, original = list[tuple[int, ...]](), module._pass

    def noted(shares: Any) -> None:
        found.append(tuple(len(part.rows) for _, part in shares))
        original(shares)

    monkeypatch.setattr(module, "_pass", noted)
    return found


BIAS = {"kind": "bias"}
CASES: dict[str, dict[str, Any]] = {
    "private": {"train": {"microbatch": 64}},
    "private-uneven": {"train": {"microbatch": 64, "sampling_rate": 0.1}},
    "private-virtual-batches": {"train": {"microbatch": 16, "sampling_rate": 0.9}},
    "private-bias": {"adapter": BIAS},
    "private-adam": {"train": {"optimizer": "adamw", "learning_rate": 0.01, "ema": 0.5, "proximal_mu": 0.1}},
    "private-turns": {"strategy": {"name": "la-lora"}},
    "private-secure": {"secure_aggregation": {"enabled": True, "max_clients": 5}},
    "private-personal": {"strategy": {"name": "feddpa"}, "adapter": {**LORA, "kind": "dual-lora"}},
    "private-ranks": {"strategy": {"name": "hetlora", "options": {"ranks": {"client-1": 2}}}},
    "open": {"privacy": {"enabled": False}},
    "open-empty": {"privacy": {"enabled": False}, "train": {"sampling_rate": 0.1}},
    "open-small-passes": {"privacy": {"enabled": False}, "train": {"microbatch": 4, "sampling_rate": 0.9}},
    "open-bias": {"privacy": {"enabled": False}, "adapter": BIAS},
    "open-corrections": {"privacy": {"enabled": False}, "strategy": {"name": "fedex"}},
    "open-last-layer": {"privacy": {"enabled": False}, "adapter": {**LORA, "layers": [-1]}},
}


@pytest.mark.parametrize("name", CASES)
def test_one_pass_gives_what_turns_give(
    tiny_base: Path, data: Path, tmp_path: Path, passes: list[tuple[int, ...]], name: str
) -> None:
    train = {"steps": 3, "sampling_rate": 0.5, "learning_rate": 0.3}
    sections = {**CASES[name], "train": train | CASES[name].get("train", {})}
    config = config_of(tiny_base, data, **sections)
    in_turn, log = trained(config, tmp_path, 1)
    assert not passes
    at_once, other = trained(shared(config), tmp_path, 5)

    assert largest_difference(products(in_turn), products(at_once)) < 1e-6
    assert [type(event) for event in log] == [type(event) for event in other]
    assert all(sum(rows) <= config.train.microbatch for rows in passes)
    assert "corrections" in name or max(len(rows) for rows in passes) > 1


def test_an_adapter_that_cannot_share_a_pass_is_named_before_anything_is_charged(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_base, data, adapter={**LORA, "dora": True}, privacy={"enabled": False})
    with pytest.raises(ModelError, match=r"cannot share out layer .*DoraLinearLayer.*leave adapter.dora out"):
        trained(shared(config), tmp_path, 5)


def test_how_many_share_a_pass(tiny_base: Path, data: Path) -> None:
    config, cuda = config_of(tiny_base, data), torch.device("cuda")
    assert number_of_workers(config, cuda, 50) == 1
    assert number_of_workers(shared(config), cuda, 50) == 32
    assert number_of_workers(shared(config), cuda, 5) == 5
    assert number_of_workers(shared(config, workers=3), cuda, 5) == 3
    buffered = config.rounds.model_copy(update={"mode": "buffered"})
    with pytest.raises(ConfigError, match=r"engine.one_pass = true is not possible: the order .* engine.one_pass out"):
        number_of_workers(shared(config).model_copy(update={"rounds": buffered}), cuda, 5)
    with pytest.raises(ConfigError, match=r"engine.one_pass = true is not possible: layers of few bits"):
        number_of_workers(shared(config, quantization="8bit"), cuda, 5)
    with pytest.raises(ConfigError, match=r'one_pass = true with engine.kind = "ray"'):
        EngineSection(kind="ray", one_pass=True)
