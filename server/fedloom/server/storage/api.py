"""What the coordinator asks of whatever keeps its state. `Store` keeps it in a local directory."""

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from fedloom.server.rounds.state import Event, UpdateAccepted
from fedloom.server.storage.audit_log import AuditRecord
from fedloom.server.storage.event_times import Traffic

__all__ = ["Storage"]


class Storage(Protocol):
    """The state of one run, held by one coordinator at a time. Any thread may call it.

    What a call has written is durable when the call returns, and found again by whoever opens the same state later.
    Every failure is a StoreError; the coordinator then stops, so nothing needs to be tried again.

    Attributes:
        epoch: How many times this state has been opened, this time included; 1 at first.
        folder: A local directory that is this coordinator's own: what can be had again may lie there meanwhile.
        where: A name for the state in messages to its operator.
        traffic: Bytes of the whole run. What is counted there lasts once `append`, `note` or `count` has returned.
    """

    epoch: int
    folder: Path
    traffic: Traffic

    @property
    def where(self) -> str:
        """A name for the state in messages to its operator."""

    def append(self, *events: Event) -> None:
        """Add events to the end of the event log: all of them or none.

        Refuses a second `UpdateAccepted` for the same round and client.
        """

    def events(self) -> list[Event]:
        """The whole event log, oldest first; refuses one that is not exactly what was written."""

    def accepted(self, round: int, client: str) -> UpdateAccepted | None:
        """The update of `client` accepted in `round`, of any round ever."""

    def note(self, *records: AuditRecord) -> None:
        """Add records to the end of the audit log: all of them or none."""

    def audit(self) -> list[AuditRecord]:
        """The whole audit log, oldest first; refuses one that is not exactly what was written."""

    def count(self) -> None:
        """Keep the traffic that was counted since something was kept last."""

    def times(self) -> dict[int, float]:
        """When each event was written, seconds since 1970, by its number in the log from 1; some may be missing."""

    def put_blob(self, blob: bytes, digest: str | None = None) -> str:
        """Keep `blob` and return its SHA-256, hex; `digest` is that if the caller has just computed it."""

    def get_blob(self, digest: str) -> bytes:
        """The blob with this SHA-256; refuses one whose bytes have changed."""

    def sweep(self, keep: Collection[str]) -> None:
        """Forget every blob but those in `keep` and those that are being written."""

    def discard(self) -> None:
        """Give back the space of what `sweep` has forgotten, which may take a while."""
