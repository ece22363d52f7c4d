"""The in-process engine: one process, one base model, every client's real trainer in turn."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from fedloom.client.data.rows import digest
from fedloom.client.participant import Participant
from fedloom.client.privacy.ledger import Ledger
from fedloom.client.trainer import EntropyFor, Trainer
from fedloom.proto.messages import PROTOCOL_VERSION, Answer, Joined, Standing, UpdateHeader
from fedloom.proto.secagg.steps import StepMessage, StepResult
from fedloom.server.coordinator import Coordinator
from fedloom.simulation.federation import Federation, check_alive

__all__ = ["LocalConnection", "run_inprocess", "standing_clock"]


def standing_clock() -> float:
    """The clock of a coordinator whose clients take turns in one process: while one trains, none can be late."""
    return 0.0


class LocalConnection:
    """A client's line to a coordinator in the same process: the same calls, checks and bytes as over a socket."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._client, self._run, self._epoch = "", "", 0

    def join(self, client: str, declared_examples: int) -> Joined:
        """Learn about the run."""
        joined = self._coordinator.join(client, PROTOCOL_VERSION, declared_examples)
        self._client, self._run, self._epoch = client, joined.run, joined.epoch
        return joined

    def work(self) -> Answer:
        """Ask for work; never waits, since the others can only move when this call returns."""
        return self._coordinator.work(self._client, self._run, self._epoch)

    def fetch(self, digest: str, size_bytes: int) -> bytes:
        """The payload."""
        return self._coordinator.blob(self._client, digest, self._run, self._epoch)

    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        """Hand in an update."""
        self._coordinator.check_header(header, self._run, self._epoch)
        return self._coordinator.submit(header, payload, self._run, self._epoch)

    def exchange(self, message: StepMessage) -> StepResult | None:
        """Send a step of a secure sum; never waits."""
        return self._coordinator.exchange(message, self._client, self._run, self._epoch)

    def heartbeat(self) -> Standing:
        """Say that this client is alive, and learn how the run stands."""
        return self._coordinator.heartbeat(self._client, self._run, self._epoch)

    def leave(self, reason: str) -> None:
        """Say that this client is not to be waited for."""
        self._coordinator.leave(self._client, reason, self._run, self._epoch)


def run_inprocess(
    federation: Federation, coordinator: Coordinator, *, entropy: dict[str, EntropyFor] | None = None
) -> Iterator[None]:
    """Run to the end, yielding after every step of a client so that the caller can look and evaluate.

    Args:
        federation: Model, data and policies.
        coordinator: Just made, on `standing_clock`, expecting as many clients as there are.
        entropy: Test seam: each client's randomness by name, see `Trainer`.

    Raises:
        FedloomError: A client cannot go on, or too many updates were refused for the round to close.
    """
    with ExitStack() as ledgers:
        participants = [
            Participant(
                LocalConnection(coordinator),
                federation.policies[name],
                partial(_trainer, federation, name, ledgers, (entropy or {}).get(name)),
            )
            for name in federation.clients
        ]
        for participant in participants:
            participant.join()
            yield
        working = list(participants)
        while working:
            for participant in list(working):
                if participant.step() is not None:
                    working.remove(participant)
                check_alive(federation, coordinator.progress)
                yield
    coordinator.close()


def _trainer(
    federation: Federation, name: str, ledgers: ExitStack, entropy_for: EntropyFor | None, joined: Joined
) -> Trainer:
    """One client's trainer on the shared model, with its own data, policy and ledger."""
    rows, policy = federation.clients[name], federation.policies[name]
    ledger = None
    if joined.spec.privacy.enabled:
        ledger = ledgers.enter_context(Ledger(policy.client.state / "ledger", digest(rows)))
    return Trainer(federation.model, rows, joined.spec, policy, ledger, entropy_for=entropy_for)
