"""Which account an example belongs to, for all accounts of one machine, without a list of the examples.

Beside its anchor each account has a file of keyed digests of every text that was ever charged to it. The key is
random and stays on this machine: without it the file does not tell whether a text is among them. So the same
people's texts are noticed when they turn up under another state folder, which would be a fresh budget for them.
A text that was changed is another text here; only the rule of one account for each state folder covers it.
"""

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedloom.proto.durable import make_folder, write_durably
from fedloom.proto.errors import LedgerError

__all__ = ["claim"]

_SIZE = 16
"""Bytes of a digest: among 10⁹ texts two share one with probability 10⁻²¹."""


def claim(anchors: Path, account: str, texts: Iterable[str]) -> None:
    """Record that `texts` are charged to `account`, beside those recorded before; durable on return.

    Raises:
        LedgerError: Some of them belong to another account of this machine, or the records cannot be used.
    """
    try:
        make_folder(anchors)
        with _locked(anchors / "examples.lock"):
            key = _key(anchors / "examples.key")
            mine = {hashlib.blake2b(text.encode(), key=key, digest_size=_SIZE).digest() for text in texts}
            for path in sorted(anchors.glob("*.examples")):
                if path.stem == account:
                    continue
                shared = len(mine & _read(path))
                if shared:
                    raise LedgerError(
                        f"{shared} of {len(mine)} texts are charged to another account of this machine, whose anchor "
                        f"is {path.with_suffix('.anchor')}; set client.state to the folder that it names, so that "
                        "both uses count together, or take these texts out of the data"
                    )
            own = anchors / f"{account}.examples"
            before = _read(own)
            if not mine <= before:
                write_durably(own, *sorted(mine | before))
    except OSError as error:
        raise LedgerError(f"the records of examples in {anchors} cannot be used: {error}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for the other clients of this machine."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _key(path: Path) -> bytes:
    if not path.exists():
        write_durably(path, secrets.token_bytes(32))
    key = path.read_bytes()
    if len(key) != 32:
        raise LedgerError(f"{path} holds {len(key)} bytes, a key has 32; restore it from a backup")
    return key


def _read(path: Path) -> set[bytes]:
    content = path.read_bytes() if path.exists() else b""
    if len(content) % _SIZE:
        raise LedgerError(f"{path} is cut off; restore it from a backup")
    return {content[start : start + _SIZE] for start in range(0, len(content), _SIZE)}
