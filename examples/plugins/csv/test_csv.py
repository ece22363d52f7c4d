"""csv passes fedloom's battery, and a spreadsheet reads it."""

import csv
from pathlib import Path

from fedloom_csv import CSV

from fedloom.conformance.recorders import RECORDS, RecorderConformance
from fedloom.core.registry import faults


class TestCSV(RecorderConformance):
    """What holds for every recorder."""

    def recorder(self) -> CSV:
        """The recorder under test."""
        return CSV()

    def test_a_line_for_each_round(self, tmp_path: Path) -> None:
        """With the largest epsilon of its clients."""
        recorder = self.recorder()
        recorder.open(tmp_path, self.config())
        for record in RECORDS:
            recorder.record(record)

        with (tmp_path / "metrics.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert [line["round"] for line in lines] == ["0", "1", "2"]
        assert [line["epsilon"] for line in lines] == ["", "2.5", "3.0"]
        assert [line["accuracy"] for line in lines] == ["0.5", "", "0.75"]


def test_it_is_found_by_name() -> None:
    assert faults("recorders", "csv") == []
