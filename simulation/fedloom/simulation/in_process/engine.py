"""The in-process engine: one process, one base model, every client's real trainer, in turn or several at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from weakref import WeakValueDictionary

import torch

from fedloom.client.data.rows import digest
from fedloom.client.privacy.ledger.account import personal_folder
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.held import HeldAdapter, Shared
from fedloom.client.session.participant import Participant
from fedloom.client.training.one_pass.passes import layers_of
from fedloom.client.training.trainer import EntropyFor, Trainer
from fedloom.proto.messages import Joined
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.local import LocalConnection
from fedloom.simulation.federation import Federation, check_alive
from fedloom.simulation.in_process.workers import Turn, number_of_workers, working

__all__ = ["client_trainer", "run_inprocess", "standing_clock"]


def standing_clock() -> float:
    """The clock of a coordinator whose clients take turns in one process: while one trains, none can be late."""
    return 0.0


def run_inprocess(
    federation: Federation, coordinator: Coordinator, *, entropy: dict[str, EntropyFor] | None = None
) -> Iterator[None]:
    """Run to the end, yielding after every step of a client so that the caller can look and evaluate.

    Args:
        federation: Model, data and policies.
        coordinator: Just made, on `standing_clock`, expecting as many clients as there are.
        entropy: Test seam: each client's randomness by name, see `Trainer`.

    Raises:
        ConfigError: The run asks for clients at once, and they cannot be had, see `number_of_workers`.
        ModelError: `engine.one_pass` is set, and the adapter has layers for which that cannot be done.
        FedloomError: A client cannot go on, or too many updates were refused for the round to close.
    """
    workers = number_of_workers(federation.config, federation.model.device, len(federation.clients))
    trainers: dict[str, Trainer] = {}
    # Those of one pass take its memory together and not each its own.
    in_memory = 1 if federation.config.engine.one_pass else workers
    if federation.config.engine.one_pass:
        layers_of(federation.model)
    adapters: Shared = WeakValueDictionary()
    with ExitStack() as stack:
        participants = [
            _participant(federation, coordinator, name, stack, (entropy or {}).get(name), trainers, in_memory)
            for name in federation.clients
        ]
        for participant in participants:
            participant.held = HeldAdapter(adapters)
            participant.join()
            yield
        turns: Callable[[Sequence[Participant], Coordinator], Iterator[Turn]] = _in_turn
        if workers > 1:
            together = federation.config.engine.one_pass
            threads = torch.get_num_threads() if together else max(1, torch.get_num_threads() // workers)
            turns = stack.enter_context(working(federation.model, workers, threads, trainers, together)).turns
        left = list(participants)
        while left:
            for participant, finished in turns(list(left), coordinator):
                if finished is not None:
                    left.remove(participant)
                check_alive(federation, coordinator)
                yield
    coordinator.close()


def _in_turn(participants: Sequence[Participant], _: Coordinator) -> Iterator[Turn]:
    for participant in participants:
        if (finished := participant.step()) is not None:
            participant.conclude(finished)
        yield participant, finished


def _participant(
    federation: Federation,
    coordinator: Coordinator,
    name: str,
    ledgers: ExitStack,
    entropy_for: EntropyFor | None,
    trainers: dict[str, Trainer],
    at_once: int,
) -> Participant:
    """One client, who scores the result where the run asks for it."""

    def ready(joined: Joined) -> Trainer:
        trainers[name] = trainer = client_trainer(federation, name, ledgers, joined, entropy_for, at_once)
        if joined.spec.federated_evaluation.enabled:
            participant.ended = lambda result, rounds: trainer.score(joined.run, rounds, result)
        return trainer

    participant = Participant(LocalConnection(coordinator), federation.policies[name], ready)
    return participant


def client_trainer(
    federation: Federation,
    name: str,
    ledgers: ExitStack,
    joined: Joined,
    entropy_for: EntropyFor | None = None,
    at_once: int = 1,
) -> Trainer:
    """One client's trainer on the shared model, with its own data, policy and ledger; the stack closes that."""
    rows, policy = federation.clients[name], federation.policies[name]
    ledger = None
    if joined.spec.privacy.enabled:
        ledger = ledgers.enter_context(Ledger(policy.client.state / "ledger", digest(rows)))
    personal = personal_folder(policy)
    return Trainer(
        federation.model,
        rows,
        joined.spec,
        policy,
        ledger,
        personal=personal,
        entropy_for=entropy_for,
        at_once=at_once,
    )
