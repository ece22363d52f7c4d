"""What a client trains and keeps: its personal tensors, one file for each run and client, beside the ledger.

What was personal in one round stays personal for the whole run, also through restarts of the client: a round that would
have it uploaded is refused, whatever the coordinator's plan says by then.
"""

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedloom.core.errors import LedgerError, PolicyError, SchemaError
from fedloom.core.runtime.durable import make_folder, write_durably
from fedloom.core.schema import Array, Schema, Tensors
from fedloom.proto.messages import Assignment

__all__ = ["Personal", "kept_personal"]

_MAGIC = b"fedloom personal 1"


class Personal:
    """The personal tensors of one client in the run that it works for.

    Args:
        folder: Where they are kept. None keeps them in memory only.
        client: The client's name.
        schema: The adapter's whole schema.
    """

    def __init__(self, folder: Path | None, client: str, schema: Schema) -> None:
        self._folder, self._client, self._schema = folder, client, schema
        self._run: str | None = None
        self._values: dict[str, Array] = {}

    def of(self, run: str) -> dict[str, Array]:
        """The values of this run, float32, by the schema's names; empty if nothing was personal in it.

        Raises:
            LedgerError: They are damaged, or are not this adapter's.
        """
        if run != self._run:
            values = {} if self._folder is None else kept_personal(self._folder, run, self._client)
            try:
                self._schema.select(values).check(values)
            except SchemaError as error:
                raise LedgerError(f"personal tensors of run {run!r} are not this adapter's: {error}") from error
            self._run, self._values = run, values
        return dict(self._values)

    def check(self, run: str, assignment: Assignment) -> None:
        """Refuse to upload what was personal before.

        Raises:
            PolicyError: The assignment asks for that. Nothing was charged.
            LedgerError: See `of`.
        """
        asked = self.of(run).keys() & self._schema.select(assignment.train, but=assignment.personal).names()
        if asked:
            what = ", ".join(sorted(self._schema.words(asked)))
            raise PolicyError(
                f"the coordinator asks for an update of {what} in round {assignment.round + 1}; "
                "that was personal in a round of this run before, and what is personal never leaves this site. Ask "
                "the coordinator's operator for a strategy that keeps its personal tensors for the whole run"
            )

    def keep(self, run: str, values: Tensors) -> None:
        """Put values in the place of those of the same names; durable on return.

        Raises:
            LedgerError: The disk refuses.
        """
        values = self.of(run) | dict(values)
        if self._folder is not None:
            _write(_path(self._folder, run, self._client), run, self._client, values)
        self._values = values


def kept_personal(folder: Path, run: str, client: str) -> dict[str, Array]:
    """The personal tensors of this client in this run, float32, by name; empty if there are none.

    Raises:
        LedgerError: The file is damaged.
    """
    path = _path(folder, run, client)
    try:
        magic, digest, rest = path.read_bytes().split(b"\n", 2)
        note, _, payload = rest.partition(b"\n")
        if (magic, digest) != (_MAGIC, hashlib.sha256(rest).hexdigest().encode()):
            raise ValueError("it is not what was written")
        if json.loads(note) != {"run": run, "client": client}:
            raise ValueError("it is another run's or client's")
        return dict(load(payload))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, SafetensorError) as error:
        raise LedgerError(
            f"personal tensors {path} cannot be read: {error}; restore the file, or remove it to begin them anew"
        ) from error


def _write(path: Path, run: str, client: str, values: Tensors) -> None:
    note = json.dumps({"run": run, "client": client}).encode()
    rest = note + b"\n" + save({name: value.copy() for name, value in values.items()})
    try:
        make_folder(path.parent)
        write_durably(path, _MAGIC, b"\n", hashlib.sha256(rest).hexdigest().encode(), b"\n", rest)
    except OSError as error:
        raise LedgerError(f"{path} cannot be written: {error}; free the disk and start the client anew") from error


def _path(folder: Path, run: str, client: str) -> Path:
    """A file name that a coordinator, who chooses the run's, has no hand in."""
    return folder / f"{hashlib.sha256(json.dumps([run, client]).encode()).hexdigest()[:32]}.personal"
