"""What a lossy codec has left out of a client's updates, to go with the next one (error feedback).

One file for each run and client. It holds the change before and after its newest round: a round that
is answered anew, after a crash or because it was opened again, begins with what it began with.
"""

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedloom.core.errors import LedgerError
from fedloom.core.runtime.durable import make_folder, write_durably
from fedloom.core.schema import Array, Schema, Tensors

__all__ = ["LeftOut"]

_MAGIC = b"fedloom left out 1"
_BEFORE, _AFTER = "before/", "after/"


class LeftOut:
    """What is left out of one client's updates in the run that it works for.

    Args:
        folder: Where it is kept.
        client: The client's name.
    """

    def __init__(self, folder: Path, client: str) -> None:
        self._folder, self.client = folder, client
        self._known: tuple[str, int, dict[str, Array]] | None = None

    def before(self, run: str, round: int, schema: Schema) -> dict[str, Array]:
        """What goes with the update for this round: tensors of `schema`, float32; zeros where nothing was left out.

        Raises:
            LedgerError: The file is damaged.
        """
        name, newest, tensors = self._read(run)
        prefix = _BEFORE if newest == round else _AFTER
        found = schema.zeros()
        if name == run and newest <= round:
            for spec in schema.tensors:
                kept = tensors.get(prefix + spec.name)
                if kept is not None and kept.shape == spec.shape:
                    found[spec.name] = kept
        return found

    def keep(self, run: str, round: int, before: Tensors, after: Tensors) -> None:
        """Note what a round began with and what its payload leaves out; durable on return.

        Raises:
            LedgerError: The disk refuses.
        """
        tensors = {_BEFORE + name: each for name, each in before.items()}
        tensors |= {_AFTER + name: each for name, each in after.items()}
        self._known = run, round, tensors
        note = json.dumps({"run": run, "client": self.client, "round": round}).encode()
        rest = note + b"\n" + save(tensors)
        path = self._path(run)
        try:
            make_folder(self._folder)
            write_durably(path, _MAGIC, b"\n", hashlib.sha256(rest).hexdigest().encode(), b"\n", rest)
        except OSError as error:
            raise LedgerError(f"{path} cannot be written: {error}; free the disk and start the client anew") from error

    def _read(self, run: str) -> tuple[str, int, dict[str, Array]]:
        if self._known is not None and self._known[0] == run:
            return self._known
        path = self._path(run)
        try:
            magic, digest, rest = path.read_bytes().split(b"\n", 2)
            note, _, payload = rest.partition(b"\n")
            about = json.loads(note)
            if (magic, digest) != (_MAGIC, hashlib.sha256(rest).hexdigest().encode()) or about["run"] != run:
                raise ValueError("it is not what was written")
            self._known = run, int(about["round"]), dict(load(payload))
        except FileNotFoundError:
            self._known = run, -1, {}
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise LedgerError(
                f"{path} cannot be read: {error}; restore the file, or remove it: what the last update left out is lost"
            ) from error
        return self._known

    def _path(self, run: str) -> Path:
        """A file name that a coordinator, who chooses the run's, has no hand in."""
        return self._folder / f"{hashlib.sha256(json.dumps([run, self.client]).encode()).hexdigest()[:32]}.left-out"
