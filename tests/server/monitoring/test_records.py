"""Records of rounds, and the programs they are written for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.conformance.recorders import RecorderConformance
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError
from fedloom.core.registry import build
from fedloom.server.monitoring.recorders.api import (
    JsonLines,
    Recorder,
    RoundRecord,
    figures,
    open_recorders,
    read_metrics,
)
from fedloom.server.monitoring.recorders.background import Recording, spent_after
from fedloom.server.rounds.state import AdapterCommitted, ClientLost, Event, RoundClosed, RoundOpened, UpdateAccepted

RECORDS = [
    RoundRecord(0, 0, 0.5, 0.7, None, None, 0, 0, 0.0),
    RoundRecord(1, 2, None, None, {"a": 1.5, "b": 2.5}, None, 300, 1200, 4.5),
    RoundRecord(2, 2, 0.75, 0.25, {"a": 2.0, "b": 3.0}, None, 300, 1200, 9.0, 1.25),
]
LOG: list[Event] = [
    RoundOpened(0, 0, "s0", ("a", "b"), 60.0),
    UpdateAccepted(0, "a", "d", 1.0),
    ClientLost(0, "b", "left"),
    RoundClosed(0, ("a",), "deadline"),
    AdapterCommitted(0, "s1"),
    RoundOpened(1, 0, "s1", ("a", "c"), 60.0),
    UpdateAccepted(1, "a", "e", 1.0),
    UpdateAccepted(1, "c", "f", 1.0),
    RoundClosed(1, ("a", "c"), "complete"),
    AdapterCommitted(1, "s2"),
]


class TestTensorBoard(RecorderConformance):
    def recorder(self) -> Recorder:
        found: Recorder = build("recorders", "tensorboard", {})
        return found


class Kept:
    """Keeps records; may fail."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.records, self.closed = fails, list[RoundRecord](), False

    def record(self, record: RoundRecord) -> None:
        if self.fails:
            raise OSError("no space")
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


def test_lines_are_kept_and_a_torn_one_spoils_no_other(tmp_path: Path) -> None:
    JsonLines(tmp_path).record(RECORDS[0])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 1, "cli')
    JsonLines(tmp_path).record(RECORDS[2])

    assert read_metrics(tmp_path) == [RECORDS[0], RECORDS[2]]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_of_the_clients_epsilons_other_programs_get_the_largest() -> None:
    assert figures(RECORDS[1])["epsilon"] == 2.5
    assert "accuracy" not in figures(RECORDS[1])
    assert "epsilon" not in figures(RECORDS[0])


def test_a_record_a_round_from_the_events(configure: Callable[..., RunConfig]) -> None:
    config = configure(privacy={"noise_multiplier": 2.0})
    kept, broken = Kept(), Kept(fails=True)
    with Recording(config, [broken, kept], lambda: {0: (80, 10), 1: (81, 11)}) as recording:
        for event in LOG:
            recording.put([event])

    assert [(each.round, each.clients, each.bytes_up, each.bytes_down) for each in kept.records] == [
        (1, 2, 10, 80),
        (2, 2, 11, 81),
    ]
    once, twice = spent_after(config, 1).epsilon, spent_after(config, 2).epsilon
    assert [each.epsilon for each in kept.records] == [{"a": once, "b": once}, {"a": twice, "b": once, "c": once}]
    assert kept.records[1].privacy == json.loads(json.dumps(spent_after(config, 2).document())) | {
        "mechanisms": spent_after(config, 2).document()["mechanisms"]
    }
    assert kept.closed
    assert not broken.closed, "it was left out when it failed"


def test_a_run_that_goes_on_counts_what_was_before(configure: Callable[..., RunConfig]) -> None:
    config = configure(privacy={"noise_multiplier": 2.0})
    kept = Kept()
    with Recording(config, [kept], dict, before=LOG[:5], seconds=7.0) as recording:
        recording.put(LOG[5:])

    (record,) = kept.records
    assert record.epsilon is not None
    assert record.epsilon["a"] == spent_after(config, 2).epsilon
    assert record.seconds >= 7.0


def test_tensorboard_reads_what_is_written(tmp_path: Path, configure: Callable[..., RunConfig]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorders = open_recorders(tmp_path, configure(), ("tensorboard",))
    for recorder in recorders:
        for record in RECORDS:
            recorder.record(record)
        recorder.close()

    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(each.step, each.value) for each in read.Scalars("accuracy")] == [(0, 0.5), (2, 0.75)]
    assert [(each.step, each.value) for each in read.Scalars("epsilon")] == [(1, 2.5), (2, 3.0)]
    assert [(each.step, each.value) for each in read.Scalars("user_epsilon")] == [(2, 1.25)]
    assert read_metrics(tmp_path) == RECORDS


@pytest.mark.filterwarnings("ignore:::mlflow", "ignore:::alembic", "ignore:::sqlalchemy")
def test_mlflow_reads_what_is_written(
    tmp_path: Path, configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow.tracking import MlflowClient

    recorders = open_recorders(tmp_path, configure(), ("mlflow",))
    for recorder in recorders:
        for record in RECORDS:
            recorder.record(record)
        recorder.close()

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedloom")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("trial", "FINISHED")
    assert run.data.params["strategy.name"] == "fedavg"
    points = client.get_metric_history(run.info.run_id, "accuracy")
    assert [(each.step, each.value) for each in points] == [(0, 0.5), (2, 0.75)]


def test_a_recorder_that_is_not_installed_is_refused(tmp_path: Path, configure: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"unknown recorder 'mlfow'; did you mean 'mlflow'\?"):
        open_recorders(tmp_path, configure(), ("mlfow",))
