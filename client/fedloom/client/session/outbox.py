"""Finished updates that wait to be sent, as they must be sent: after a crash the same bytes go out again.

One file for each run and client, beside the ledger. The update is written there before its charge is released and
before its first byte is sent, so that whatever has left this machine can be sent again and need not be computed,
and noised, a second time.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedloom.client.session.terms import Terms
from fedloom.core.errors import LedgerError
from fedloom.core.runtime.durable import make_folder, sync_folder, write_durably
from fedloom.core.runtime.failpoints import failpoint, reach
from fedloom.proto.messages import UpdateHeader

__all__ = ["OutboxEntry", "check_outbox", "drop", "keep", "kept"]

_MAGIC = b"fedloom update 1"


@dataclass(frozen=True)
class OutboxEntry:
    """An update that is finished and must reach the coordinator as it is, however often it takes.

    Args:
        run: The run it is for.
        charge: Number of the ledger's charge; None without privacy.
        header: What precedes the payload.
        payload: The exact bytes.
        terms: Under what it may leave, see `terms`; None if the first release wrote it.
    """

    run: str
    charge: int | None
    header: UpdateHeader
    payload: bytes
    terms: Terms | None


@failpoint("outbox.keep")
def keep(folder: Path, update: OutboxEntry) -> None:
    """Write the update in the place of the client's last one in this run; durable on return.

    Raises:
        LedgerError: The disk refuses; nothing may be sent.
    """
    path = _path(folder, update.run, update.header.client)
    content = {"run": update.run, "charge": update.charge, "header": asdict(update.header)}
    if update.terms is not None:
        content["terms"] = asdict(update.terms)
    note = json.dumps(content).encode()
    digest = hashlib.sha256(note).hexdigest().encode()
    try:
        make_folder(folder)
        write_durably(path, _MAGIC, b"\n", digest, b"\n", note, b"\n", update.payload)
    except OSError as error:
        raise LedgerError(f"{path} cannot be written: {error}; free the disk and start the client anew") from error


def kept(folder: Path, run: str, client: str) -> OutboxEntry | None:
    """The update of this client that waits to be sent in this run, if there is one.

    Raises:
        LedgerError: It is damaged. It must not be sent, and its round must not be computed again.
    """
    path = _path(folder, run, client)
    if not path.exists():
        return None
    update = _read(path)
    if (update.run, update.header.client) != (run, client):
        raise _damaged(path, f"it is of client {update.header.client!r} in run {update.run!r}")
    return update


@failpoint("outbox.drop")
def drop(folder: Path, run: str, client: str) -> None:
    """Forget the update of this client in this run, if there is one; durable on return.

    Raises:
        LedgerError: The disk refuses.
    """
    path = _path(folder, run, client)
    try:
        if path.exists():
            path.unlink()
            reach("outbox.dropped")
            sync_folder(folder)
    except OSError as error:
        raise LedgerError(f"{path} cannot be removed: {error}; make its folder writable") from error


def check_outbox(folder: Path) -> list[OutboxEntry]:
    """Every update that waits to be sent, of all runs.

    Raises:
        LedgerError: One is damaged.
    """
    return [_read(path) for path in sorted(folder.glob("*.update"))]


def _path(folder: Path, run: str, client: str) -> Path:
    """A file name that a coordinator, who chooses the run's, has no hand in."""
    return folder / f"{hashlib.sha256(json.dumps([run, client]).encode()).hexdigest()[:32]}.update"


def _read(path: Path) -> OutboxEntry:
    try:
        magic, digest, note, payload = path.read_bytes().split(b"\n", 3)
        if magic != _MAGIC or hashlib.sha256(note).hexdigest().encode() != digest:
            raise _damaged(path, "its first lines are not those that were written")
        content = json.loads(note)
        header = UpdateHeader(**content["header"])
        header = replace(header, score=tuple(header.score))  # a list in JSON
        terms = Terms(**content["terms"]) if "terms" in content else None
        update = OutboxEntry(content["run"], content["charge"], header, payload, terms)
    except OSError as error:
        raise LedgerError(
            f"waiting update {path} cannot be read: {error}; see that this user may read it, and start the client again"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from error
    found = hashlib.sha256(payload).hexdigest()
    if (len(payload), found) != (update.header.payload_bytes, update.header.digest):
        raise _damaged(
            path,
            f"{len(payload)} bytes with digest {found[:12]}, where {update.header.payload_bytes} bytes with digest "
            f"{str(update.header.digest)[:12]} were written",
        )
    return update


def _damaged(path: Path, how: str) -> LedgerError:
    return LedgerError(
        f"waiting update {path} is damaged ({how}) and is not sent; restore it, or remove it and start the client "
        "again once its round is over: its charge stays in the ledger"
    )
