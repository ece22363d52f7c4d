"""Every adapter kind that comes with fedloom through a private run: trained, committed, exported and reloaded."""

import json
from pathlib import Path

import pytest

from fedloom.core.config.run import RunConfig
from fedloom.core.registry import entries
from fedloom.simulation.simulate import simulate
from tests.families import save_family

KINDS = {name: {"kind": name} for name, entry in sorted(entries("adapters").items()) if entry.ours}
KINDS |= {start: {"kind": "lora", "start": start} for start in ("orthogonal", "pissa", "olora")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and rows of two classes."""
    made = tmp_path_factory.mktemp("federation")
    save_family("bert", made / "bert")
    for name, count in {"train": 60, "test": 30}.items():
        rows = [{"text": f"film {n % 7} {('great', 'awful')[n % 2]}", "label": n % 2} for n in range(count)]
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_private_run_of_the_kind_leaves_what_it_scored(tmp_path: Path, folder: Path, kind: str) -> None:
    config = RunConfig.model_validate(
        {
            "run": {"name": kind, "rounds": 2, "seed": 5},
            "model": {"base": str(folder / "bert"), "labels": ["praise", "blame"], "max_length": 32},
            "adapter": {**KINDS[kind], "rank": 2, "alpha": 4, "targets": "auto"},
            "train": {"steps": 2, "sampling_rate": 0.4, "learning_rate": 0.5},
            "privacy": {"epsilon": 50.0, "delta": 1e-3},
            "data": {"source": str(folder), "clients": 2},
            "engine": {"threads": 1},
        }
    )

    result = simulate(config, tmp_path / "runs")

    assert result.agreement == 1.0
    assert result.final.loss != result.start.loss
    assert set(result.epsilon) == {"client-0", "client-1"}
    assert all(0 < spent <= 50.0 for spent in result.epsilon.values())
