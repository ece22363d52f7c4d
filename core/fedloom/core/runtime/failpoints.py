"""Named places at which a process can be made to fail, so that tests can kill it everywhere (after etcd's gofail).

Off unless FEDLOOM_FAILPOINTS is set when the process starts, which no deployment should: `name=action[@nth]`, several
separated by `;`. The action happens at the nth time the place is reached, the first unless said otherwise::

    crash         the process kills itself with SIGKILL
    raise         the place fails with its error, and what comes after it is not done
    sleep:0.5     the place takes half a second longer
    ambiguous     what the place does is done, and then fails all the same; only for calls, see `failpoint`
"""

import inspect
import logging
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from errno import EIO
from functools import wraps
from typing import Any, TypeVar, cast

from fedloom.core.errors import ConfigError, FedloomError, LedgerError, StoreError, Unavailable

__all__ = ["CALLS", "ENVIRONMENT", "LINES", "arm", "failpoint", "hits", "reach"]

ENVIRONMENT = "FEDLOOM_FAILPOINTS"
"""Variable that arms failpoints."""

CALLS = {
    "store.epoch": "the count of openings goes up",
    "store.append": "events are written to the log",
    "store.read": "the log is read at the start",
    "store.blob": "a blob is written",
    "store.fetch": "a blob is read back",
    "store.sweep": "blobs nobody needs lose their names",
    "store.discard": "what lost its name is deleted",
    "history.begin": "a run is begun on an empty directory",
    "history.continue": "a run is taken up where its log ends",
    "history.write": "recorded events are made durable",
    "history.commit": "a closed round is folded and committed",
    "history.reread": "an accepted update is read back for the fold",
    "broadcast.prepare": "the next round's broadcasts are encoded",
    "submission.check": "a payload is compared with its header",
    "submission.decode": "a payload is decoded and its values are checked",
    "rpc.join": "the coordinator answers Join",
    "rpc.work": "the coordinator answers Work",
    "rpc.fetch": "the coordinator answers Fetch",
    "rpc.submit": "the coordinator answers Submit",
    "rpc.heartbeat": "the coordinator answers Heartbeat",
    "rpc.leave": "the coordinator answers Leave",
    "line.join": "the client calls Join",
    "line.work": "the client calls Work",
    "line.fetch": "the client calls Fetch",
    "line.submit": "the client calls Submit",
    "line.heartbeat": "the client calls Heartbeat",
    "line.leave": "the client calls Leave",
    "participant.join": "the client joins and looks at what its outbox holds",
    "participant.train": "the client answers an assignment",
    "participant.deliver": "the client hands in its update",
    "outbox.keep": "a finished update is put into the outbox",
    "outbox.drop": "a waiting update is forgotten",
    "durable.write": "a client file is replaced",
    "ledger.open": "the ledger is read and compared with its anchor",
    "ledger.reserve": "a round is charged",
    "ledger.release": "what leaves for a charge is noted",
    "anchor.write": "the anchor follows the ledger",
}
"""Failpoints that are whole calls."""

LINES = {
    "store.opened": "the directory is locked and its database open",
    "store.append.begun": "events are in a transaction that is not committed",
    "store.appended": "events are committed, and nobody knows yet",
    "store.blob.written": "a blob is in a temporary file, not synchronised",
    "store.blob.synced": "a blob is synchronised under a temporary name",
    "store.blob.renamed": "a blob has its name, and its folder is not synchronised",
    "store.swept": "one more blob has lost its name",
    "history.born": "the first state is a blob, and no event names it",
    "history.folded": "every update is folded, and the strategy has not committed",
    "history.stepped": "the new state exists in memory only",
    "history.stored": "the new state is a blob, and no event names it",
    "history.committed": "the commit is recorded, and not yet written",
    "rpc.submit.read": "an upload has come whole, and nothing is decided",
    "rpc.submit.taken": "an update is durable, and its client does not know",
    "rpc.fetch.chunk": "one more chunk is about to go down",
    "serve.bound": "the port is bound, and nobody is served",
    "serve.ready": "the coordinator serves",
    "serve.tick": "leases and the deadline are about to be looked at",
    "serve.over": "the run is over and the server about to stop",
    "line.fetch.chunk": "one more chunk has come down",
    "line.submit.header": "an update's header is sent, and its payload is not",
    "participant.prepared": "the client has joined once and can train",
    "participant.left_over": "an update from before the restart is found in the outbox",
    "participant.fetched": "the broadcast is here",
    "participant.trained": "the noisy update exists in memory only",
    "participant.stored": "the update is in the outbox, and not released",
    "participant.released": "the update is released, and nothing is sent",
    "participant.delivered": "the coordinator has the update, and the client has not noted it",
    "outbox.dropped": "a waiting update is gone, and its folder is not synchronised",
    "durable.written": "a client file is in a temporary file, not synchronised",
    "durable.synced": "a client file is synchronised under a temporary name",
    "durable.renamed": "a client file has its name, and its folder is not synchronised",
    "ledger.add.begun": "entries are in a transaction that is not committed",
    "ledger.added": "an entry is committed, and the anchor is behind",
    "ledger.appended": "an entry and its anchor are durable, and the caller does not know",
}
"""Failpoints between two lines."""

hits: Counter[str] = Counter()
"""How often each armed failpoint was reached in this process."""

_ERRORS: dict[str, type[FedloomError]] = {
    "store": StoreError,
    "history": StoreError,
    "line": Unavailable,
    "ledger": LedgerError,
    "outbox": LedgerError,
}
"""What a place of this kind raises when it fails by itself; the others fail with EIO, as disks do."""

_FORM = re.compile(
    r"(?P<name>[a-z_.]+)=(?P<action>crash|raise|ambiguous|sleep:(?P<seconds>\d+(\.\d+)?))(@(?P<nth>\d+))?"
)

_log = logging.getLogger(__name__)

Call = TypeVar("Call", bound=Callable[..., Any])


@dataclass(frozen=True)
class _Armed:
    action: str
    nth: int
    seconds: float


_armed: dict[str, _Armed] = {}
_counting = threading.Lock()


def arm(text: str) -> None:
    """Arm failpoints, in place of those armed before. Calls that were defined before stay as they are.

    Raises:
        ConfigError: The text is not of the form above, or names no failpoint.
    """
    found: dict[str, _Armed] = {}
    for part in filter(None, (each.strip() for each in text.split(";"))):
        match = _FORM.fullmatch(part)
        if match is None or match["name"] not in CALLS.keys() | LINES.keys():
            raise ConfigError(
                f"{ENVIRONMENT} has {part!r}; it takes NAME=ACTION[@NTH] of fedloom.core.runtime.failpoints"
            )
        if match["action"] == "ambiguous" and match["name"] in LINES:
            raise ConfigError(f"{ENVIRONMENT} has {part!r}; between two lines nothing is done that could be ambiguous")
        found[match["name"]] = _Armed(match["action"], int(match["nth"] or 1), float(match["seconds"] or 0))
    _armed.clear()
    _armed.update(found)
    hits.clear()
    if found:
        _log.warning("failpoints are armed: %s", text)


def reach(name: str) -> None:
    """The place `name`, between two lines."""
    if _armed:
        _before(name)


def failpoint(name: str) -> Callable[[Call], Call]:
    """The place `name`, a whole call or coroutine. Not armed when it is defined, it is left as it is."""

    def mark(call: Call) -> Call:
        if name not in _armed:
            return call
        if inspect.iscoroutinefunction(call):

            @wraps(call)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                ambiguous = _before(name)
                result = await call(*args, **kwargs)
                return _after(name, result, ambiguous)

            return cast(Call, awaited)

        @wraps(call)
        def called(*args: Any, **kwargs: Any) -> Any:
            ambiguous = _before(name)
            result = call(*args, **kwargs)
            return _after(name, result, ambiguous)

        return cast(Call, called)

    return mark


def _before(name: str) -> bool:
    """Count, and fail if it is time to; whether to fail afterwards instead."""
    armed = _armed.get(name)
    if armed is None:
        return False
    with _counting:
        hits[name] += 1
        due = hits[name] == armed.nth
    if due and armed.action == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if due and armed.action == "raise":
        raise _error(name)
    if due:
        time.sleep(armed.seconds)
    return due and armed.action == "ambiguous"


def _after(name: str, result: Any, ambiguous: bool) -> Any:
    if ambiguous:
        raise _error(name)
    return result


def _error(name: str) -> Exception:
    """The error of this place."""
    kind = _ERRORS.get(name.partition(".")[0])
    return OSError(EIO, f"failpoint {name}") if kind is None else kind(f"failpoint {name}")


arm(os.environ.get(ENVIRONMENT, ""))
