"""The task passes the battery, its metrics are scikit-learn's, and a private federation trains it."""

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from fedloom_regression import Regression
from sklearn.metrics import r2_score, root_mean_squared_error

from fedloom.conformance.tasks import TaskConformance
from fedloom.conformance.tiny_model import save_tiny_model


class TestRegression(TaskConformance):
    """fedloom's battery."""

    name = "regression"

    def task(self):
        return Regression(tolerance=0.25)


def test_the_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    wanted, said = rng.normal(3, 2, 50), rng.normal(3, 2, 50)

    found = Regression().summary(Regression().metrics(torch.tensor(said)[:, None], torch.tensor(wanted)))

    np.testing.assert_allclose(found["rmse"], root_mean_squared_error(wanted, said))
    np.testing.assert_allclose(found["r2"], r2_score(wanted, said))


def test_an_answer_within_the_tolerance_is_right():
    scores, labels = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[1.2], [2.3]])

    assert Regression(tolerance=0.25).right(scores, labels).tolist() == [[True], [False]]


def test_a_private_federation_trains_it(tmp_path: Path) -> None:
    draw = random.Random(0)
    (tmp_path / "data").mkdir()
    for part, rows in (("train", 200), ("test", 50)):
        with (tmp_path / "data" / f"{part}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("text", "label"))
            for number in range(rows):
                words = [f"w{draw.randrange(40)}" for _ in range(8)]
                table.writerow((" ".join(words), sum(word in ("w1", "w2", "w3") for word in words) + number % 2 / 2))
    run = {
        "run": {"name": "numbers", "rounds": 2},
        "model": {"base": str(save_tiny_model(tmp_path / "model")), "task": "regression", "tolerance": 0.75},
        "train": {"steps": 2, "sampling_rate": 0.2, "learning_rate": 0.05},
        "privacy": {"epsilon": 20, "delta": 1e-4},
        "data": {"source": str(tmp_path / "data"), "clients": 2},
    }
    settings = [
        f"--set={table}.{key}={json.dumps(value)}" for table, keys in run.items() for key, value in keys.items()
    ]
    (tmp_path / "run.toml").touch()
    command = [sys.executable, "-m", "fedloom.cli.main", "simulate", "run.toml", "--out", "runs", *settings]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    summary = json.loads((tmp_path / "runs" / "numbers" / "summary.json").read_text())
    assert summary["metrics"].keys() == {"rmse", "r2"}
    assert 0 < max(summary["epsilon"].values()) <= 20
    assert summary["reloaded_agreement"] == 1.0
    assert "held-out rmse" in done.stdout
