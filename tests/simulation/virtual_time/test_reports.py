"""Where a run has virtual time, its figures are shown by it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from fedloom.cli.simulation.simulate import _line
from fedloom.core.config.run import RunConfig
from fedloom.server.monitoring.recorders.api import RoundRecord
from fedloom.simulation.run_folder import draw, metrics_frame
from tests.support.preloaded import fedloom
from tests.support.runs import tiny_run

START = RoundRecord(0, 0, 0.5, 0.7, {"ann": 0.0}, None, 0, 0, 0.0)
ROUND = RoundRecord(1, 2, 0.6, 0.6, {"ann": 1.0}, None, 10, 20, 3.0)
PLAIN = [START, ROUND]
VIRTUAL = [replace(START, virtual_seconds=0.0), replace(ROUND, virtual_seconds=1234.5)]


@pytest.fixture
def config() -> RunConfig:
    return tiny_run(Path("tiny"))


def test_curves_are_drawn_over_virtual_time_where_there_is_any() -> None:
    for records, label, places in ((PLAIN, "round", [0, 1]), (VIRTUAL, "virtual time (s)", [0.0, 1234.5])):
        axes = draw("title", records).axes
        assert {each.get_xlabel() for each in axes} == {label}
        assert [np.asarray(each.lines[0].get_xdata()).tolist() for each in axes[:2]] == [places, places]
        assert np.asarray(axes[2].lines[0].get_xdata()).tolist() == places


def test_the_table_has_it_where_there_is_any() -> None:
    assert "virtual_seconds" not in metrics_frame(PLAIN).columns
    assert list(metrics_frame(VIRTUAL)["virtual_seconds"]) == [0.0, 1234.5]


def test_a_round_is_told_with_its_virtual_time(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    for record in (ROUND, VIRTUAL[1]):
        _line(config, record)

    plain, virtual = capsys.readouterr().out.splitlines()
    assert plain.endswith("  3 s")
    assert virtual.endswith("  3 s  virtual 1,234 s")


def test_two_runs_are_compared_by_it(tmp_path: Path) -> None:
    for name, records in (("one", PLAIN), ("two", VIRTUAL)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.toml").write_text("")
        lines = [json.dumps(asdict(record)) for record in records]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))

    done = fedloom("runs", "compare", tmp_path / "one", tmp_path / "two", "--json")

    assert [each["virtual_seconds"] for each in json.loads(done.stdout)["figures"]] == [None, 1234.5]
