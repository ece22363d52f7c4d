"""A client's line to a coordinator in the same process; whoever has clients on another carrier makes one for each."""

from fedloom.proto.messages import PROTOCOL_VERSION, Answer, Joined, RoundStatus, StepMessage, StepResult, UpdateHeader
from fedloom.server.coordinator import Coordinator

__all__ = ["LocalConnection"]


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

    def work(self, held: str = "") -> Answer:
        """Ask for work; never waits, since the others can only move when this call returns."""
        return self._coordinator.work(self._client, self._run, self._epoch, held)

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

    def heartbeat(self) -> RoundStatus:
        """Say that this client is alive, and learn how the run stands."""
        return self._coordinator.heartbeat(self._client, self._run, self._epoch)

    def leave(self, reason: str, score: tuple[float, ...] = ()) -> None:
        """Say that this client is not to be waited for, and at the end what its held-out rows say of the result."""
        self._coordinator.leave(self._client, reason, self._run, self._epoch, score)
