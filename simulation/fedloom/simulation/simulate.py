"""One call from a run file to a PEFT adapter in a run folder."""

import os
import queue
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fedloom.client.adapters.attach import check_private
from fedloom.client.data.rows import digest
from fedloom.client.eval.confusion import classes_document
from fedloom.client.eval.score import Score, evaluate
from fedloom.client.models.base_folder import resolve_base
from fedloom.client.models.exports.facts import facts
from fedloom.client.models.exports.loading import load_exported, predict
from fedloom.client.models.exports.result import result_name, save_result, writable
from fedloom.client.models.load import ON_CPU
from fedloom.client.models.start import start_of
from fedloom.client.policy import ComputePolicy
from fedloom.client.privacy.dp_sgd.probe import probe
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training.gradients import batch_loss
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import FedloomError, ModelError
from fedloom.core.model_card import held_out_facts
from fedloom.core.privacy.accounting import Statement
from fedloom.core.runtime.memory import peak_bytes
from fedloom.core.schema import Tensors
from fedloom.server.build import build_strategy
from fedloom.server.coordinator import Coordinator
from fedloom.server.monitoring.participation import Attendance
from fedloom.server.monitoring.progress import Progress
from fedloom.server.monitoring.recorders.api import RecordWriter, RoundRecord, open_recorders, write_config
from fedloom.server.monitoring.recorders.background import is_scored, round_record
from fedloom.server.privacy.user_ledger import statement as user_statement
from fedloom.server.rounds.state import AdapterCommitted, Event
from fedloom.server.storage.local import Store
from fedloom.server.validate_config import check_config
from fedloom.simulation.callbacks import SoFar, StopRun
from fedloom.simulation.checkpoint import save_round
from fedloom.simulation.federation import Federation, Given, build, completed
from fedloom.simulation.in_process.engine import run_inprocess, standing_clock
from fedloom.simulation.personal import save_clients, scored
from fedloom.simulation.processes import run_processes
from fedloom.simulation.ray_engine.cluster import check_installed
from fedloom.simulation.ray_engine.engine import run_ray
from fedloom.simulation.run_folder import new_folder, plot, write_json
from fedloom.simulation.virtual_time.engine import Clock, check_virtual, clients_at_start, run_in_virtual_time
from fedloom.strategies.api import State, Strategy

__all__ = ["Result", "Watcher", "ledger_statements", "simulate"]


@dataclass
class Watcher:
    """Callbacks of a display and of whoever runs it; each does nothing unless set."""

    ready: Callable[[Federation, Path], None] = lambda _federation, _folder: None
    moved: Callable[[Progress], None] = lambda _progress: None
    recorded: Callable[[RoundRecord], None] = lambda _record: None
    before_rounds: Callable[[SoFar], object] = lambda _so_far: None
    after_round: Callable[[SoFar], object] = lambda _so_far: None
    """May raise `StopRun`."""


@dataclass(frozen=True)
class Result:
    """What a simulation leaves."""

    folder: Path
    records: list[RoundRecord]
    start: Score
    final: Score
    privacy: dict[str, Statement]
    """What each client has spent, read from its ledger; empty without privacy."""
    user_epsilon: float | None
    """Epsilon of a whole client, by the coordinator's noise; None without user-level privacy."""
    agreement: float
    """Share of held-out rows on which the exported result, reloaded, predicts what the run's model predicts."""
    told: dict[str, float | None] | None = None
    """What the clients' evaluations say of the adapter; None without federated evaluation, or where noise hides it."""
    cpu_seconds: float = 0.0
    """Processor time of this process and of those that it started and that have ended, from the call to the summary."""
    peak_bytes: int | None = None
    """The most memory that this process has held since it began; None where the system does not say."""

    @property
    def exported(self) -> Path:
        """Where the result lies: `adapter`, or `merged` where PEFT does not know the kind of the adapter."""
        plain = self.folder / "adapter"
        return plain if plain.is_dir() else self.folder / "merged"

    @property
    def epsilon(self) -> dict[str, float]:
        """Epsilon by client; empty without privacy."""
        return {name: stated.epsilon for name, stated in self.privacy.items()}


@dataclass
class _Tape:
    """Commits waiting to be evaluated, what has been recorded, and where."""

    recorders: list[RecordWriter]
    commits: "queue.SimpleQueue[tuple[int, State, float | None]]" = field(default_factory=queue.SimpleQueue)
    """Rounds committed, the state after them, and the virtual time."""
    records: list[RoundRecord] = field(default_factory=list)
    events: "queue.SimpleQueue[Event]" = field(default_factory=queue.SimpleQueue)
    """The log as it grows, from where it was read last."""
    seen: Attendance = field(default_factory=Attendance)
    told: dict[str, float | None] | None = None
    """What the clients say of the result."""
    score: tuple[int, Score] | None = None
    """The last score of an adapter that all clients share, and after how many rounds it was taken."""

    def append(self, events: Sequence[Event], _seconds: float) -> None:
        """More events are durable."""
        for event in events:
            self.events.put(event)

    def read_to(self, rounds: int) -> Attendance:
        """What the log says up to the commit of so many rounds, which is in it already."""
        while True:
            event = self.events.get()
            self.seen.add(event)
            if isinstance(event, AdapterCommitted) and event.round == rounds - 1:
                return self.seen


_AGREEMENT, _AGREEMENT_IN_FEW_BITS = 0.995, 0.95
"""Share of held-out predictions that the exported adapter must repeat; rounding may turn a tie. In a base of few bits
what a strategy adds to frozen weights is rounded too, and in the exported adapter it is not."""


def simulate(
    config: RunConfig,
    out: Path,
    watcher: Watcher | None = None,
    *,
    report_to: tuple[str, ...] = (),
    given: Given | None = None,
    own: Strategy | None = None,
) -> Result:
    """Run a federation on this machine.

    Args:
        config: A run file, with a [data] section unless data are given.
        out: Parent of the run folder.
        watcher: Callbacks.
        report_to: Names of recorders that get every record too.
        given: Data in place of those of the run file.
        own: A strategy that is installed nowhere, in place of the one that the run file names.

    Raises:
        FedloomError: Anything that stops the run; nothing is left that looks like a finished run.
    """
    with _threads(config.engine.threads):
        return _simulate(config, out, watcher or Watcher(), report_to, given, own)


def _simulate(
    config: RunConfig,
    out: Path,
    watcher: Watcher,
    report_to: tuple[str, ...],
    given: Given | None,
    own: Strategy | None,
) -> Result:
    busy = _busy_seconds()
    config = completed(config, own)
    strategy = build_strategy(config, own)
    check_config(config, strategy)  # as the coordinator will, but before anything is loaded or written
    check_private(config)
    if config.engine.kind == "ray":
        check_installed()
    check_virtual(config)
    folder = new_folder(out, config.run.name)
    write_config(folder, config)
    try:
        federation = build(config, folder, given)
        starting, expected = start_of(config, federation.model), clients_at_start(federation)
        if config.privacy.enabled:
            # Every client would refuse such a model too, but once the run has begun.
            model = federation.model
            probe(model, partial(batch_loss, model), config.model.max_length)
    except BaseException:
        shutil.rmtree(folder)  # nothing has run, so there is nothing to keep
        raise
    schema = federation.model.schema
    watcher.ready(federation, folder)
    federation.model.show(starting)
    start = evaluate(federation.model, federation.held_out, generate=federation.config.evaluation.generate)
    with ExitStack() as stack:
        tape = _Tape(open_recorders(folder, config, report_to))
        for recorder in tape.recorders:
            stack.callback(recorder.close)
        store = stack.enter_context(Store(folder / "state", durable=False))
        store.appended = tape.append
        clock = None if config.virtual_time is None else Clock()
        virtual_s: Callable[[], float | None] = clock or (lambda: None)
        coordinator = Coordinator(
            config,
            schema,
            strategy,
            store,
            starting=starting,
            clock=clock or (None if config.engine.kind == "grpc" else standing_clock),
            expect=expected,
        )
        coordinator.on_commit = lambda rounds, state: tape.commits.put((rounds, state, virtual_s()))
        began = time.monotonic()
        figures, clock_s = dict(start.metrics) or None, virtual_s()
        begin = RoundRecord(
            0, 0, start.accuracy, start.loss, None, None, 0, 0, 0.0, metrics=figures, virtual_seconds=clock_s
        )
        _record(tape, watcher, begin)
        watcher.before_rounds(SoFar(folder, (begin,), partial(save_round, federation, coordinator.result(), begin)))
        for _ in _engine(federation, coordinator, folder, clock):
            watcher.moved(coordinator.progress)
            _drain(federation, coordinator, tape, watcher, began, folder)
        _drain(federation, coordinator, tape, watcher, began, folder)
        if not coordinator.finished:
            raise FedloomError(f"the run stopped after {coordinator.progress.round} of {config.run.rounds} rounds")
        tape.told = coordinator.told
        run, rounds, result = coordinator.progress.run, coordinator.state.round, coordinator.result()
    return _finish(federation, folder, tape, start, run, rounds, result, busy)


def _busy_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    """Give torch so many threads, 0 for its own choice; afterwards as many as whoever called had."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _engine(federation: Federation, coordinator: Coordinator, folder: Path, virtual: Clock | None) -> Iterator[None]:
    engine = federation.config.engine
    if virtual is not None:
        return run_in_virtual_time(federation, coordinator, virtual, folder)
    if engine.kind == "inprocess":
        return run_inprocess(federation, coordinator)
    if engine.kind == "ray":
        return run_ray(federation, coordinator)
    # Several processes on few cores: one torch thread each is fastest, more only wait for each other.
    share = max(1, (os.cpu_count() or 1) // len(federation.clients))
    return run_processes(federation, coordinator, folder, engine.threads or share)


def _drain(
    federation: Federation, coordinator: Coordinator, tape: _Tape, watcher: Watcher, began: float, folder: Path
) -> None:
    """Evaluate and record the rounds committed since the last call, and end the run where a callback says so."""
    config = federation.config
    while not tape.commits.empty():
        rounds, state, virtual_s = tape.commits.get()
        seen = tape.read_to(rounds)
        score = None
        if is_scored(config, rounds):
            score, own = scored(federation, coordinator.progress.run, coordinator.result(state))
            tape.score = None if own else (rounds, score)
        traffic = coordinator.progress.bytes_by_round.get(rounds - 1, (0, 0))
        record = round_record(config, rounds, seen, federation.clients, traffic, time.monotonic() - began)
        record = replace(record, virtual_seconds=virtual_s)
        if score is not None:
            record = replace(record, accuracy=score.accuracy, loss=score.loss, metrics=dict(score.metrics) or None)
        _record(tape, watcher, record)
        save = partial(save_round, federation, coordinator.result(state), record)
        try:
            watcher.after_round(SoFar(folder, tuple(tape.records), save))
        except StopRun:
            coordinator.finish()


def _worst(stated: Mapping[str, Statement]) -> Statement:
    """The statement of the client that has spent most."""
    return max(stated.values(), key=lambda each: each.epsilon)


def _record(tape: _Tape, watcher: Watcher, record: RoundRecord) -> None:
    tape.records.append(record)
    for recorder in tape.recorders:
        recorder.record(record)
    watcher.recorded(record)


def _finish(
    federation: Federation,
    folder: Path,
    tape: _Tape,
    start: Score,
    run: str,
    rounds: int,
    trained: Tensors,
    busy: float,
) -> Result:
    """Export the adapter, or each client's, reload it as a user would, and write the summary and the plot."""
    config, model = federation.config, writable(federation.model, federation.config)
    compute = ComputePolicy.of(config.engine) if model is federation.model else ON_CPU
    if tape.score is not None and tape.score[0] == rounds:
        final, own = tape.score[1], dict[str, Score]()  # what a model writes takes long
    else:
        final, own = scored(federation, run, trained)
    spent = ledger_statements(federation) if config.privacy.enabled else {}
    user = user_statement(config.user_level, rounds)
    known = facts(config, _worst(spent) if spent else None, user)
    exported = folder / result_name(model)
    save_clients(federation, model, run, trained, own, folder, known)
    model.show(trained)
    save_result(model, exported, {**known, **held_out_facts(final.accuracy, final.loss, final.metrics)})
    pad = model.tokenizer.pad_token_id
    ours = predict(model.model, model.task, federation.held_out, pad)
    model.leave()  # its place is needed for the same model again
    base, section = resolve_base(config.model.base), config.model
    count, side, seconds = len(section.labels), section.image_size, section.audio_seconds
    reloaded = load_exported(base, exported, count, section.task, side, compute, seconds)
    agreement = float(np.mean(np.isclose(ours, predict(reloaded, model.task, federation.held_out, pad), rtol=1e-3)))
    plot(folder, f"{folder.name}: {config.strategy.name}, {len(federation.clients)} clients", tape.records)
    user_epsilon = user["epsilon"] if user else None
    peak = peak_bytes() if sys.platform == "linux" else None
    cpu = _busy_seconds() - busy
    result = Result(folder, tape.records, start, final, spent, user_epsilon, agreement, tape.told, cpu, peak)
    write_json(
        folder / "summary.json",
        {
            "accuracy_start": start.accuracy,
            "accuracy": final.accuracy,
            "accuracy_by_client": {name: score.accuracy for name, score in own.items()},
            "loss_start": start.loss,
            "loss": final.loss,
            "metrics_start": dict(start.metrics),
            "metrics": dict(final.metrics),
            "held_out_examples": final.examples,
            **classes_document(final.confusion, config.model.labels),
            "federated": tape.told,
            "epsilon": result.epsilon,
            "privacy": {name: stated.document() for name, stated in spent.items()},
            "user_epsilon": result.user_epsilon,
            "reloaded_agreement": agreement,
            "seconds": tape.records[-1].seconds,
            "virtual_seconds": tape.records[-1].virtual_seconds,
            "bytes_up": sum(r.bytes_up for r in tape.records),
            "bytes_down": sum(r.bytes_down for r in tape.records),
            "cpu_seconds": cpu,
            "peak_bytes": peak,
        },
    )
    exact = (compute.dtype, compute.quantization) == ("float32", "none")
    needed = _AGREEMENT if exact else _AGREEMENT_IN_FEW_BITS
    if agreement < needed:
        raise ModelError(
            f"the {exported.name} in {exported} gives {agreement:.1%} of the held-out predictions of the model that "
            f"was trained, at least {needed:.1%} must be the same; do not use it: loaded by transformers and PEFT, "
            "this base model is another one than in the run"
        )
    return result


def ledger_statements(federation: Federation) -> dict[str, Statement]:
    """What each client's own ledger says it has spent."""
    stated: dict[str, Statement] = {}
    for name, rows in federation.clients.items():
        policy = federation.policies[name]
        with Ledger(policy.client.state / "ledger", digest(rows)) as ledger:
            stated[name] = ledger.statement(policy.privacy.delta, covers="the whole life of the data set")
    return stated
