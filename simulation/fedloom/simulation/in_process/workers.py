"""Clients that train at once in one process: a thread for each, with an adapter of its own on the same frozen weights.

Two clients' steps, each on half of the cores, are done sooner than one after the other on all of them: a step on few
tokens is too small to be shared out.
"""

import queue
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager

import torch

from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.session.participant import Participant
from fedloom.client.training.one_pass.meeting import OnePass
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError
from fedloom.proto.messages import Finished
from fedloom.server.coordinator import Coordinator

__all__ = ["Turn", "Workers", "number_of_workers", "working"]

_IN_ONE_PASS = 32
"""Clients of a pass where a run does not say."""

Turn = tuple[Participant, Finished | None]
"""Who had a turn, and the end of the run if it is over for it."""


def number_of_workers(config: RunConfig, device: torch.device, clients: int) -> int:
    """Clients that train at once: `engine.workers`, or by default one for each torch thread of a run on the CPU.

    Raises:
        ConfigError: More than one is asked for where their order decides the result, or the base cannot be shared.
    """
    asked, one_pass, why = config.engine.workers, config.engine.one_pass, ""
    if config.rounds.mode == "buffered":
        why = 'the order of updates decides what buffered rounds give; use engine.kind = "grpc" for clients at once'
    elif config.engine.quantization != "none":
        why = "layers of few bits serve one thread; set engine.quantization to none"
    if why and (asked > 1 or one_pass):
        key = "one_pass = true" if one_pass else f"workers = {asked}"
        raise ConfigError(f"engine.{key} is not possible: {why}, or leave engine.{key.split()[0]} out")
    if why or (asked == 0 and device.type != "cpu" and not one_pass):
        return 1
    return min(clients, asked or (_IN_ONE_PASS if one_pass else torch.get_num_threads()))


class Workers:
    """Threads that give participants their turns.

    Args:
        models: A model for each.
        threads: Torch threads of each.
        trainers: By client, once it has joined.
        one_pass: Whether they compute the gradients of a step together.
    """

    def __init__(
        self, models: Sequence[AdapterModel], threads: int, trainers: Mapping[str, Trainer], one_pass: bool = False
    ) -> None:
        self._turns = OnePass(len(models))
        self._one_pass = self._turns if one_pass else None
        self._free: queue.SimpleQueue[AdapterModel] = queue.SimpleQueue()
        for model in models:
            self._free.put(model)
        self._trainers = trainers
        self._pool = ThreadPoolExecutor(len(models), "worker", torch.set_num_threads, (threads,))

    def turns(self, participants: Sequence[Participant], coordinator: Coordinator) -> Iterator[Turn]:
        """One turn for each, in no order.

        When a round is committed, those that have not begun are left out: the caller looks at it first.
        """
        rounds = coordinator.state.round

        def turn(participant: Participant) -> Turn | None:
            if coordinator.state.round != rounds:
                return None
            trainer, model = self._trainers[participant.name], self._free.get()
            try:
                trainer.use(model, self._one_pass)
                finished = participant.step()
                if finished is not None:
                    participant.conclude(finished)
                return participant, finished
            finally:
                self._free.put(model)

        def counted(participant: Participant) -> Turn | None:
            try:
                return turn(participant)
            finally:
                self._turns.ended()

        self._turns.expect(len(participants))
        pending = [self._pool.submit(counted, participant) for participant in participants]
        try:
            for done in as_completed(pending):
                if (result := done.result()) is not None:
                    yield result
        finally:
            for each in pending:
                if each.cancel():
                    self._turns.ended()

    def close(self) -> None:
        """Wait for those who are at work."""
        self._turns.close()
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def working(
    model: AdapterModel, count: int, threads: int, trainers: Mapping[str, Trainer], one_pass: bool = False
) -> Iterator[Workers]:
    """So many workers for the length of a `with` block; `model` is left to the caller."""
    workers = Workers([model.twin() for _ in range(count)], threads, trainers, one_pass)
    try:
        yield workers
    finally:
        workers.close()
