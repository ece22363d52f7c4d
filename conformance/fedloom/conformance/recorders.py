"""What every recorder must do.

::

    from fedloom.conformance.recorders import RecorderConformance

    class TestMine(RecorderConformance):
        def recorder(self):
            return Mine()
"""

from pathlib import Path
from typing import Any

import pytest

from fedloom.core.config.run import RunConfig
from fedloom.server.monitoring.recorders.api import Recorder, RoundRecord

__all__ = ["RecorderConformance"]

RECORDS = (
    RoundRecord(0, 0, 0.5, 0.7, None, None, 0, 0, 0.0),
    RoundRecord(1, 2, None, None, {"a": 1.5, "b": 2.5}, None, 300, 1200, 4.5),
    RoundRecord(2, 2, 0.75, 0.25, {"a": 2.0, "b": 3.0}, {"epsilon": 3.0}, 300, 1200, 9.0, 1.25, {"accuracy": None}),
)
"""A start, a round that was not scored, and one that has all there is."""


class RecorderConformance:
    """The battery. Define `recorder`; it must write below the run's folder here, whatever it does elsewhere."""

    def recorder(self) -> Recorder:
        """A fresh instance of the recorder under test."""
        raise NotImplementedError("define recorder() in the subclass and return the recorder under test")

    def config(self) -> RunConfig:
        """A small run file."""
        sections: dict[str, dict[str, Any]] = {
            "run": {"name": "trial", "rounds": 2},
            "model": {"base": "minilm-l6", "labels": ["no", "yes"]},
            "train": {"steps": 1, "sampling_rate": 0.1, "learning_rate": 1.0},
        }
        return RunConfig.model_validate(sections)

    def test_every_record_is_there_when_the_call_returns(self, tmp_path: Path) -> None:
        """A run may be killed right after it."""
        recorder = self.recorder()
        recorder.open(tmp_path, self.config())
        seen = _files(tmp_path)

        for record in RECORDS:
            recorder.record(record)
            now = _files(tmp_path)
            assert now != seen, f"nothing below the run's folder tells of round {record.round}"
            seen = now
        recorder.close()

    def test_a_run_that_goes_on_keeps_what_is_there(self, tmp_path: Path) -> None:
        """A coordinator that resumes opens its recorders again."""
        sizes = []
        for record in RECORDS:
            recorder = self.recorder()
            recorder.open(tmp_path, self.config())
            recorder.record(record)
            recorder.close()
            sizes.append(sum(len(content) for content in _files(tmp_path).values()))

        assert sizes == sorted(sizes), "it is shorter than it was"
        assert _files(tmp_path)

    def test_a_run_without_rounds_closes(self, tmp_path: Path) -> None:
        """It may be stopped before its first."""
        recorder = self.recorder()
        recorder.open(tmp_path, self.config())
        recorder.close()

    def test_a_folder_that_cannot_be_written_is_an_error(self, tmp_path: Path) -> None:
        """Never silence: who asked for records is told."""
        recorder, missing = self.recorder(), tmp_path / "file"
        missing.write_text("not a folder")

        try:
            recorder.open(missing, self.config())
            recorder.record(RECORDS[0])
        except Exception:  # whatever another program's package raises
            return
        pytest.fail("it wrote nothing and said nothing")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
