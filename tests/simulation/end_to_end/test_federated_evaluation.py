"""Federated evaluation in whole runs: the figures are those of the rows that clients hold out, on every engine."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedloom.client.data.load import load_rows
from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import encode
from fedloom.client.eval.score import evaluate
from fedloom.client.models.load import load_model
from fedloom.client.training.local_eval import split
from fedloom.core.config.run import RunConfig
from fedloom.core.privacy.accounting import epsilon
from fedloom.core.privacy.spends import run_spends
from fedloom.server.monitoring.recorders.api import read_metrics
from fedloom.simulation.federation import completed
from fedloom.simulation.federation import shares as rows_of_clients
from fedloom.simulation.simulate import simulate
from fedloom.strategies.start import starting_adapter

pytestmark = pytest.mark.usefixtures("preloaded_clients")


@pytest.fixture
def data(tmp_path: Path, rows: Rows) -> Path:
    """240 different rows to train on, and ten to test."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, part in (("train", range(240)), ("test", range(10))):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([f"{rows.texts[i % 40]} {i} {name}", rows.label_names[rows.labels[i % 40]]] for i in part)
    return folder


def run_of(data: Path, base: Path, kind: str, private: bool, **scored: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": f"{kind}-{private}", "rounds": 3, "seed": 5},
            "model": {"base": str(base), "labels": ["negative", "positive"], "max_length": 16},
            "adapter": {"rank": 4, "alpha": 8},
            "train": {"steps": 3, "sampling_rate": 0.5, "learning_rate": 0.3},
            "privacy": {"enabled": private, "epsilon": 20.0, "delta": 1e-3},
            "rounds": {"min_clients": 2},
            "data": {"source": str(data), "clients": 2},
            "engine": {"threads": 1, "kind": kind},
            "federated_evaluation": {"enabled": True, **scored},
        }
    )


@pytest.mark.parametrize("kind", ["inprocess", "grpc"])
def test_figures_are_those_of_all_rows_held_out(data: Path, tiny_base: Path, tmp_path: Path, kind: str) -> None:
    config = completed(run_of(data, tiny_base, kind, private=False, every=2, max_loss=100.0))
    result = simulate(config, tmp_path / "runs")
    records = read_metrics(result.folder)
    assert [each.federated is not None for each in records] == [False, True, False, True]

    assert config.data is not None
    parts = [split(rows, 0.1)[1] for rows in rows_of_clients(config, config.data).values()]
    texts = {text for part in parts for text in part.texts}
    train = load_rows(str(data), config.model.labels, "train")
    held_out = train.take(np.flatnonzero([text in texts for text in train.texts]))
    assert len(held_out) == sum(map(len, parts)) > 10
    model = load_model(config.model, config.adapter)
    model.load(starting_adapter(model.schema, config.run.seed))
    exact = evaluate(model, encode(held_out, model.tokenizer, 16))
    first = records[1].federated
    assert first is not None
    assert first["accuracy"] == pytest.approx(exact.accuracy, abs=1e-6)
    assert first["loss"] == pytest.approx(exact.loss, rel=1e-4)
    assert records[3].federated != first, "the third round started from another adapter"

    model.load(load_file(result.folder / "adapter" / "adapter_model.safetensors"))
    exact = evaluate(model, encode(held_out, model.tokenizer, 16))
    assert result.told is not None
    assert result.told["accuracy"] == pytest.approx(exact.accuracy, abs=1e-6)
    assert result.told["loss"] == pytest.approx(exact.loss, rel=1e-4)
    assert json.loads((result.folder / "summary.json").read_text())["federated"] == result.told


def test_a_private_run_stays_within_its_epsilon_with_evaluations(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = completed(run_of(data, tiny_base, "inprocess", True, noise_multiplier=2.0, personalised=True))
    result = simulate(config, tmp_path / "runs")
    spent = epsilon(run_spends(config, 3), 1e-3)
    for stated in result.privacy.values():
        assert stated.rounds == 3
        assert {(each.sampling_rate, each.noise_multiplier, each.steps) for each in stated.mechanisms} >= {
            (1.0, 2.0, 4)
        }
        assert spent - 0.05 < stated.epsilon <= spent <= 20.0
    records = read_metrics(result.folder)
    assert set(records[-1].epsilon or {}) == set(result.privacy)
    assert max((records[-1].epsilon or {}).values()) == pytest.approx(spent)
    names = {"accuracy", "loss", "personalised_accuracy", "personalised_loss"}
    shown = names | {f"{name}_margin" for name in names} | {"standard_error"}
    told = json.loads((result.folder / "summary.json").read_text())["federated"]
    assert told == result.told
    # The noise of three sites on a dozen rows often leaves a count too small to divide by, and then nothing is shown.
    assert all(each.federated is None or each.federated.keys() == shown for each in records)
