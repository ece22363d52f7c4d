"""A grid of runs and its table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedloom.api as fl
from fedloom.core.errors import ConfigError

Make = Callable[..., fl.Run]


def test_every_combination_is_run_and_the_table_has_their_means(
    tiny_run: Make, data: dict[str, Any], listed: list[dict[str, Any]], tmp_path: Path
) -> None:
    grid: dict[str, list[Any]] = {"train.learning_rate": [1e-3, 2.0], "strategy": [fl.FedAvg(), fl.FFA()]}

    found = fl.sweep(
        tiny_run(rounds=1), grid, seeds=2, data=data, test=listed[30:], out=tmp_path / "runs", progress=False
    )

    assert [(t.setting["train.learning_rate"], t.seed) for t in found.trials] == [
        (1e-3, 3), (1e-3, 4), (1e-3, 3), (1e-3, 4), (2.0, 3), (2.0, 4), (2.0, 3), (2.0, 4)
    ]  # fmt: skip
    assert len({trial.result.folder for trial in found.trials}) == 8
    table = found.table()
    assert table["accuracy"].is_monotonic_decreasing
    assert table["seeds"].tolist() == [2] * 4
    (row,) = table[(table["train.learning_rate"] == 2.0) & table["strategy"].str.startswith("FFA")].to_dict("records")
    chosen = [t.result for t in found.trials if t.setting["train.learning_rate"] == 2.0 and "FFA" in repr(t.setting)]
    assert row["accuracy"] == pytest.approx(np.mean([each.accuracy for each in chosen]))
    assert row["accuracy_std"] == pytest.approx(np.std([each.accuracy for each in chosen], ddof=1))
    assert row["loss"] == pytest.approx(np.mean([each.score.loss for each in chosen]))
    assert np.isnan(row["epsilon"])


@pytest.mark.parametrize(
    ("grid", "seeds", "message"),
    [
        ({"train.learning_rat": [1]}, 1, "unknown key 'train.learning_rat'; did you mean 'learning_rate'"),
        ({"train.learning_rate": 4}, 1, r"train.learning_rate is 4; give a list of values to try, such as \[4\]"),
        ({"train.learning_rate": [1, -1]}, 1, "train.learning_rate: Input should be greater"),
        ({}, 1, "there is nothing to try"),
        ({"train.learning_rate": [1]}, 0, "there is nothing to try"),
    ],
)
def test_a_grid_is_checked_before_the_first_run(
    grid: dict[str, Any], seeds: int, message: str, tiny_run: Make, data: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        fl.sweep(tiny_run(), grid, seeds=seeds, data=data, out=tmp_path / "runs")

    assert not (tmp_path / "runs").exists()
