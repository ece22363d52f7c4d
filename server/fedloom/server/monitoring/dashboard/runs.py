"""The runs of a folder, and the one that this process coordinates. Answers are half a second old."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedloom.core.config.run import RunConfig, load_run
from fedloom.core.errors import ConfigError, FedloomError, StoreError, StrategyError
from fedloom.server.coordinator import Coordinator
from fedloom.server.monitoring.dashboard.adapter import RESULTS
from fedloom.server.monitoring.dashboard.csv_table import rounds_csv
from fedloom.server.monitoring.dashboard.view import Spent, document, past_rounds, traffic
from fedloom.server.monitoring.recorders.api import METRICS_FILE, RoundRecord, read_metrics
from fedloom.server.monitoring.status import Observation
from fedloom.server.storage.follow import Journal
from fedloom.server.storage.verify import holder, state_folders

__all__ = ["Board"]

_FRESH_S = 0.5
_PROBE_S = 5.0
_SHOWN = 100
_ALARM_S = 60.0


class Board:
    """What the dashboard shows. Any thread may ask.

    Args:
        coordinator: The run of this process.
        observation: What stops it, and its metrics.
        runs: Folder with other runs; None shows this one alone.
        certs: The coordinator's folder of certificates; None if it has none.
        clock: Seconds, never going back.

    Attributes:
        own: Name of the run of this process.
        certs: The coordinator's folder of certificates; None if it has none.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        observation: Observation,
        runs: Path | None = None,
        certs: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.coordinator, self.observation, self.certs = coordinator, observation, certs
        self._state, self._runs, self._clock = coordinator.folder.absolute(), runs, clock
        self.own = _run_folder(self._state).name if runs else coordinator.config.run.name
        self._mutex, self._probing = threading.Lock(), threading.Lock()
        self._journals: dict[Path, Journal] = {}
        self._spent: dict[Path, Spent] = {}
        self._shown: dict[str, tuple[float, dict[str, Any]]] = {}
        self._listed: tuple[float, list[dict[str, Any]]] | None = None
        self._probed_s, self._problem = -_PROBE_S, ""

    def listing(self) -> list[dict[str, Any]]:
        """Name, phase and rounds of every run, this process's first, then the newest."""
        with self._mutex:
            if self._listed is None or self._clock() - self._listed[0] > 4 * _FRESH_S:
                folders = [folder for name, folder in self._folders().items() if name != self.own][:_SHOWN]
                self._listed = self._clock(), [self._line(folder) for folder in (self._state, *folders)]
            return self._listed[1]

    def run(self, name: str) -> dict[str, Any] | None:
        """Everything of one run; None if there is none of this name."""
        with self._mutex:
            shown = self._shown.get(name)
            if shown is not None and self._clock() - shown[0] <= _FRESH_S:
                return shown[1]
            folder = self.folder(name)
            if folder is None:
                return None
            made = self._document(name, folder)
            if len(self._shown) > _SHOWN:
                self._shown.clear()
            self._shown[name] = self._clock(), made
            return made

    def rounds(self, name: str) -> str | None:
        """The committed rounds of a run as CSV; None if there is no run of this name."""
        with self._mutex:
            folder = self.folder(name)
            if folder is None:
                return None
            journal, records = self._journal(folder), _records(_run_folder(folder))
            with suppress(FedloomError):
                journal.refresh()
            return rounds_csv(past_rounds(journal, traffic(records, journal)), records)

    def folder(self, name: str) -> Path | None:
        """The state directory of a run of this name. The name is looked up, and never made a path of."""
        return self._state if name == self.own else self._folders().get(name)

    def run_folder(self, name: str) -> Path | None:
        """Where a run's metrics and its adapter lie."""
        folder = self.folder(name)
        return None if folder is None else _run_folder(folder)

    def problem(self) -> str:
        """Why the coordinator cannot write its state; empty if it can. What it says is a few seconds old."""
        with self._probing:
            if self._clock() - self._probed_s >= _PROBE_S:
                self._problem = self._probe()
                self._probed_s = self._clock()
            return self._problem

    def _probe(self) -> str:
        path = self._state / "probe.tmp"
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(b"written to see whether it can be\n")
                file.flush()
                os.fsync(file.fileno())
            path.unlink()
        except OSError as error:
            return f"the state directory cannot be written: {error.strerror}"
        with self._mutex:
            journal = self._journal(self._state)
            try:
                journal.refresh()
            except StoreError:
                return "the state cannot be read"
        return "" if journal.epoch == self.coordinator.epoch else "another coordinator has opened the state directory"

    def _document(self, name: str, folder: Path) -> dict[str, Any]:
        ours, run_folder = folder == self._state, _run_folder(folder)
        journal = self._journal(folder)
        about: dict[str, Any] = {"name": name, "ours": ours, "at": time.time(), "error": None}
        try:
            journal.refresh()
        except FedloomError as error:
            about["error"] = str(error) if ours else "its log cannot be read; try fedloom runs verify"
        config = self.coordinator.config if ours else _config(run_folder)
        spent = None if config is None else self._spent.setdefault(folder, Spent(config))
        progress = self.coordinator.progress if ours and self.observation.stop is not None else None
        shown = document(journal, config, _records(run_folder), progress, spent)
        if not ours and shown["phase"] == "stopped" and _held(folder):
            shown["phase"] = "elsewhere"
        adapter = None
        if not ours or shown["phase"] == "over":
            adapter = next((each for each in RESULTS if (run_folder / RESULTS[each] / "fedloom.json").is_file()), None)
        if adapter is None and ours and journal.rounds.round:
            adapter = "state"
        stoppable = ours and self.observation.stop is not None
        alarm = _alarm(shown["open"], self.coordinator.fault if stoppable else None)
        return {**about, **shown, "adapter": adapter, "stoppable": stoppable, "alarm": alarm}

    def _line(self, folder: Path) -> dict[str, Any]:
        ours, journal = folder == self._state, self._journal(folder)
        name = self.own if ours else _run_folder(folder).name
        config = self.coordinator.config if ours else _config(_run_folder(folder))
        with suppress(FedloomError):
            journal.refresh()
        total = config.run.rounds if config else None
        phase = "over" if journal.rounds.over(total) else "running" if ours or _held(folder) else "stopped"
        return {"name": name, "ours": ours, "round": journal.rounds.round, "rounds": total, "phase": phase}

    def _journal(self, folder: Path) -> Journal:
        if len(self._journals) > 2 * _SHOWN:  # of folders that may be gone long since
            self._journals, self._spent = {}, {}
        return self._journals.setdefault(folder, Journal(folder))

    def _folders(self) -> dict[str, Path]:
        """State directories by the name of their run, the newest first."""
        if self._runs is None:
            return {}
        found = []
        for folder in state_folders(self._runs):
            with suppress(OSError):  # it has just been deleted
                found.append(((folder / "run.db").stat().st_mtime, folder.absolute()))
        return {_run_folder(folder).name: folder for _, folder in sorted(found, reverse=True)}


def _alarm(open_round: dict[str, Any] | None, fault: StrategyError | None) -> str:
    """Why the run stands still until somebody does something; empty if it does not."""
    if fault is not None:
        return f"the strategy fails: {fault}"
    waits = open_round is not None and open_round["waiting"] and open_round["waiting_s"] >= _ALARM_S
    return str(open_round["waiting"]) if open_round is not None and waits else ""


def _run_folder(state: Path) -> Path:
    """runs/NAME of runs/NAME/state."""
    return state.parent if state.name == "state" else state


def _config(folder: Path) -> RunConfig | None:
    try:
        return load_run(folder / "run.toml")
    except ConfigError:
        return None


def _records(folder: Path) -> list[RoundRecord]:
    try:
        return read_metrics(folder) if (folder / METRICS_FILE).is_file() else []
    except (OSError, UnicodeDecodeError):
        return []


def _held(folder: Path) -> bool:
    try:
        return holder(folder) is not None
    except StoreError:
        return False
