"""What callbacks hear and when, and when a run is stopped early."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

import fedloom.api as fl
from fedloom.core.errors import ConfigError
from fedloom.server.monitoring.recorders.api import RoundRecord
from tests.api.conftest import same

Make = Callable[..., fl.Run]
Go = Callable[..., fl.Result]


@dataclass
class Diary(fl.Callback):
    """Writes down what it hears."""

    heard: list[tuple[str, Any]] = field(default_factory=list)

    def on_run_begin(self, so_far: fl.SoFar) -> None:
        assert not (so_far.folder / "summary.json").exists()
        so_far.save_adapter(so_far.folder / "start")
        self.heard.append(("begin", so_far))

    def on_round_end(self, so_far: fl.SoFar) -> None:
        self.heard.append(("round", so_far))

    def on_run_end(self, result: fl.Result) -> None:
        assert (result.folder / "summary.json").is_file()
        self.heard.append(("end", result))


def test_a_callback_hears_the_begin_each_round_and_the_end(tiny_run: Make, go: Go) -> None:
    diary, numbers = Diary(), list[int]()

    result = go(tiny_run(rounds=2), callbacks=[lambda so_far: numbers.append(so_far.round), diary])

    assert [moment for moment, _ in diary.heard] == ["begin", "round", "round", "end"]
    assert [each.round for _, each in diary.heard[:3]] == [0, 1, 2]
    assert numbers == [1, 2], "a function hears of rounds alone"
    assert diary.heard[0][1].accuracy == result.metrics["accuracy"][0]
    assert diary.heard[-1][1] is result
    again = go(tiny_run(rounds=2, name="again", start=fl.Start(adapter=str(result.folder / "start"))))
    assert same(again.folder / "adapter", result.folder / "adapter"), "what begins is the starting adapter"


def test_all_hear_of_the_round_that_one_of_them_ends_the_run_with(tiny_run: Make, go: Go) -> None:
    diary = Diary()

    def stop(_so_far: fl.SoFar) -> None:
        raise fl.StopRun

    result = go(tiny_run(rounds=3), callbacks=[stop, fl.Checkpoint(), diary])

    assert [moment for moment, _ in diary.heard] == ["begin", "round", "end"]
    assert same(result.folder / "checkpoints" / "round-1", result.folder / "adapter")


def test_a_run_that_fails_has_no_end(tiny_run: Make, go: Go) -> None:
    diary = Diary()

    def fail(_so_far: fl.SoFar) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        go(tiny_run(), callbacks=[diary, fail])

    assert [moment for moment, _ in diary.heard] == ["begin", "round"]


def so_far(accuracy: float | None, number: int = 1, **changes: Any) -> fl.SoFar:
    loss = None if accuracy is None else 1 - accuracy
    record = RoundRecord(number, 2, accuracy, loss, None, None, 8, 8, 0.5, **changes)
    return fl.SoFar(Path("run"), (record,), lambda _folder: None)


def stops_after(stopping: fl.EarlyStopping, accuracies: list[float | None]) -> int | None:
    """The round after which it stops."""
    stopping.on_run_begin(so_far(0.0, 0))
    for number, accuracy in enumerate(accuracies, 1):
        try:
            stopping(so_far(accuracy, number))
        except fl.StopRun:
            return number
    return None


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize(
    ("accuracies", "patience", "threshold", "end"),
    [
        ([0.5, 0.6, 0.7, 0.8], 1, 0.0, None),
        ([0.5, 0.5], 1, 0.0, 2),
        ([0.5, 0.4, 0.6, 0.5, 0.6], 2, 0.0, 5),
        ([0.5, None, None, 0.4, None, 0.4], 2, 0.0, 6),
        ([0.5, 0.55, 0.58, 0.59], 3, 0.1, 4),
        ([0.5, 0.55, 0.62, 0.63], 3, 0.1, None),
    ],
)
def test_it_stops_when_nothing_is_better_for_so_many_rounds(
    metric: str, accuracies: list[float | None], patience: int, threshold: float, end: int | None
) -> None:
    stopping = fl.EarlyStopping(metric=metric, patience=patience, threshold=threshold)

    assert stops_after(stopping, accuracies) == end
    assert stops_after(stopping, accuracies) == end, "another run begins afresh"


def test_it_knows_the_best_round_and_takes_no_nan_for_one() -> None:
    stopping = fl.EarlyStopping(metric="accuracy", patience=9)

    stops_after(stopping, [float("nan"), 0.5, 0.8, float("nan"), 0.7])

    assert (stopping.best, stopping.best_round) == (0.8, 3)


def test_a_tasks_own_metric_says_which_way_is_better() -> None:
    stopping = fl.EarlyStopping(metric="rmse", patience=1, greater_is_better=False)
    stopping(so_far(0.5, metrics={"rmse": 2.0}))
    stopping(so_far(0.5, metrics={"rmse": 1.0}))

    with pytest.raises(fl.StopRun):
        stopping(so_far(0.5, metrics={"rmse": 1.5}))
    with pytest.raises(ConfigError, match="cannot tell which rmse is better; set greater_is_better"):
        fl.EarlyStopping(metric="rmse")
    with pytest.raises(ConfigError, match=r"knows no 'rmse'; a round has accuracy, .*loss"):
        stopping(so_far(0.5))


def test_noised_figures_are_waited_for() -> None:
    stopping = fl.EarlyStopping(metric="federated_accuracy", patience=1)

    stopping(so_far(0.5, federated={"accuracy": 0.7}))
    stopping(so_far(0.5, federated={"accuracy": None}))
    with pytest.raises(fl.StopRun):
        stopping(so_far(0.5, federated={"accuracy": 0.6}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patience": 0}, "patience is 0"),
        ({"threshold": -1.0}, "threshold is -1"),
        ({"threshold": float("nan")}, "nan"),
    ],
)
def test_what_would_never_stop_or_always_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fl.EarlyStopping(**changes)


def test_a_run_stops_early_and_is_charged_for_what_it_did(tiny_run: Make, go: Go) -> None:
    told = list[dict[str, float]]()
    run = tiny_run(
        rounds=5,
        train=fl.Train(steps=2, sampling_rate=0.5, learning_rate=0.5),
        privacy=fl.DP(epsilon=20, noise_multiplier=1.5),
    )
    stopping = fl.EarlyStopping(metric="bytes_up", patience=1, greater_is_better=True)  # the same in every round

    result = go(run, callbacks=[stopping, lambda each: told.append(each.epsilon_by_client)])

    assert result.records[-1].round == 2
    assert [stated.rounds for stated in result.privacy.values()] == [2, 2]
    assert told[-1] == pytest.approx(result.epsilon)
    assert all(told[0][name] < told[1][name] for name in ("clinic-a", "clinic-b"))


def test_a_logger_gets_numbers_by_name(tiny_run: Make, go: Go) -> None:
    logged = dict[int, dict[str, float]]()

    result = go(tiny_run(rounds=2), callbacks=[lambda each: logged.update({each.round: each.figures})])

    assert list(logged) == [1, 2]
    for number, found in logged.items():
        assert found["accuracy"] == result.metrics["accuracy"][number]
        assert found["loss"] == result.metrics["loss"][number]
        assert all(type(value) is float for value in found.values())


def test_nothing_more_of_a_private_run_reaches_a_callback() -> None:
    """Whoever adds a field says here why it tells nothing of the rows beyond what was noised or is public."""
    public = {"round", "clients", "bytes_up", "bytes_down", "seconds", "virtual_seconds"}
    of_the_plan = {"epsilon", "privacy", "user_epsilon"}  # by rounds that a client took part in, not by its rows
    noised = {"federated"}
    held_out = {"accuracy", "loss", "metrics"}  # rows that are given for scores

    assert {each.name for each in fields(RoundRecord)} == public | of_the_plan | noised | held_out
    assert {each.name for each in fields(fl.SoFar)} == {"folder", "records", "save_adapter"}
