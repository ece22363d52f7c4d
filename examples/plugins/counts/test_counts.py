"""The task passes the battery, its loss is torch's and scipy's, and a private federation trains it."""

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fedloom_counts import Counts
from scipy.stats import poisson
from sklearn.metrics import mean_absolute_error, mean_poisson_deviance

from fedloom.client.data.layout import Layout
from fedloom.conformance.tasks import TaskConformance
from fedloom.conformance.tiny_model import save_tiny_model
from fedloom.core.errors import DataError


class TestCounts(TaskConformance):
    """fedloom's battery."""

    name = "counts"

    def task(self):
        return Counts(tolerance=1)

    def perfect(self, placed, wanted):
        return wanted.clamp(min=0.25).log()[..., None].to(placed.dtype)


def drawn():
    rng = np.random.default_rng(0)
    log_rate, count = rng.normal(1, 1, 50).astype(np.float32), rng.poisson(3, 50).astype(np.float32)
    return torch.tensor(log_rate)[:, None], torch.tensor(count)


def test_the_loss_is_that_of_scipy_and_its_gradient_that_of_torch():
    scores, counts = drawn()
    ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()

    loss = Counts().loss(ours, counts)
    loss.sum().backward()
    torch.nn.functional.poisson_nll_loss(theirs[:, 0], counts, log_input=True, reduction="sum").backward()

    exact = -poisson.logpmf(counts.numpy(), scores[:, 0].double().exp().numpy())
    np.testing.assert_allclose(loss.detach(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_metrics_are_those_of_scikit_learn():
    scores, counts = drawn()

    found = Counts().summary(Counts().metrics(scores, counts))

    rate = scores[:, 0].double().exp().numpy()
    np.testing.assert_allclose(found["deviance"], mean_poisson_deviance(counts.numpy(), rate), rtol=1e-6)
    np.testing.assert_allclose(found["mean_error"], mean_absolute_error(counts.numpy(), rate), rtol=1e-6)


@pytest.mark.parametrize("label", [-1, 2.5, 2**24 + 2])
def test_what_is_no_count_is_refused(label):
    with pytest.raises(DataError, match=r"row 1 has a label that is no whole number from 0 to 16777216"):
        Layout("counts").read({"text": "a note", "label": label}, "row 1")


@pytest.mark.parametrize(("tolerance", "right"), [(0, [True, False]), (1, [True, True])])
def test_an_answer_within_the_tolerance_is_right(tolerance, right):
    scores, counts = torch.tensor([[[2.1]], [[2.1]]]).log(), torch.tensor([[2.0], [3.0]])

    assert Counts(tolerance=tolerance).right(scores, counts).flatten().tolist() == right


def test_a_private_federation_trains_it(tmp_path: Path) -> None:
    draw = random.Random(0)
    (tmp_path / "data").mkdir()
    for part, rows in (("train", 200), ("test", 50)):
        with (tmp_path / "data" / f"{part}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("text", "label"))
            for _ in range(rows):
                words = [f"w{draw.randrange(40)}" for _ in range(8)]
                table.writerow((" ".join(words), sum(word in ("w1", "w2", "w3") for word in words)))
    run = {
        "run": {"name": "counts", "rounds": 2},
        "model": {"base": str(save_tiny_model(tmp_path / "model")), "task": "counts", "tolerance": 1},
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

    summary = json.loads((tmp_path / "runs" / "counts" / "summary.json").read_text())
    assert summary["metrics"].keys() == {"deviance", "mean_error"}
    assert 0 < max(summary["epsilon"].values()) <= 20
    assert summary["reloaded_agreement"] == 1.0
    assert "held-out deviance" in done.stdout
