"""Held-out rows and the process that scores on them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.data.rows import Rows
from fedloom.client.eval.held_out import HeldOut, held_out
from fedloom.client.eval.worker import scoring
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError, Unavailable
from fedloom.strategies.start import starting_adapter
from tests.support.runs import tiny_run


@pytest.fixture
def source(tmp_path: Path, rows: Rows) -> Path:
    """A file whose columns have names of their own."""
    lines = [f"{text},{rows.label_names[label]}" for text, label in zip(rows.texts, rows.labels, strict=True)]
    path = tmp_path / "held-out.csv"
    path.write_text("\n".join(["body,label", *lines]) + "\n")
    return path


@pytest.fixture
def config(tiny_base: Path) -> RunConfig:
    return tiny_run(
        tiny_base,
        train={"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.3},
        data={"source": "sentiment", "columns": {"text": "body"}, "max_examples": 7},
        evaluation={"max_examples": 10},
    )


def newest_child() -> int:
    return int(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()[-1])


def test_rows_are_drawn_by_the_seed_alone(source: Path, config: RunConfig) -> None:
    once, again = (held_out(config, str(source), "train").texts for _ in range(2))
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 6})})
    assert config.data is not None
    all_rows = config.model_copy(update={"data": config.data.model_copy(update={"max_examples": None})})

    assert once == again
    assert len(once) == 10
    assert held_out(other, str(source), "train").texts != once
    assert held_out(all_rows, str(source), "train").texts == once


def test_a_process_scores_what_this_one_scores(source: Path, config: RunConfig) -> None:
    here = HeldOut.load(config, str(source), "train")
    start = starting_adapter(here.model.schema, 5)
    rng = np.random.default_rng(2)
    moved = {name: rng.normal(0, 0.3, each.shape).astype(np.float32) for name, each in start.items()}

    with scoring(config, str(source)) as score:
        # A terminal and a service manager say stop to a coordinator's whole group; the last score is still wanted.
        for each in (signal.SIGINT, signal.SIGTERM):
            os.kill(newest_child(), each)
        assert os.getpriority(os.PRIO_PROCESS, newest_child()) >= min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
        found = [score(start), score(moved), score(start)]

    assert [accuracy for accuracy, _ in found] == [here.score(each).accuracy for each in (start, moved, start)]
    assert [loss for _, loss in found] == pytest.approx(
        [here.score(each).loss for each in (start, moved, start)], abs=1e-5
    )
    assert found[0] != found[1]
    assert here.score_start().loss == here.score(start).loss


def test_a_process_that_is_gone_is_an_error_and_no_wait(source: Path, config: RunConfig) -> None:
    with scoring(config, str(source)) as score:
        os.kill(newest_child(), signal.SIGKILL)

        with pytest.raises(Unavailable, match="has ended with status -9"):
            score({"x": np.zeros(2**20, np.float32)})


def test_it_says_what_to_install(
    source: Path, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    with (
        pytest.raises(ConfigError, match=r"needs 'torch', which is not installed; install fedloom\[client\]"),
        scoring(config, str(source)),
    ):
        pass


def test_the_side_that_waits_loads_no_torch() -> None:
    code = "import sys, fedloom.client.eval.worker; print(*{'torch', 'transformers', 'peft'} & sys.modules.keys())"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)

    assert done.stdout.split() == []
