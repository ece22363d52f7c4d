"""Which account an example belongs to, for all accounts of one machine, without a list of the examples.

Beside its anchor each account has a file of keyed digests of every text that was ever charged to it, as it stands and
in its normal form, and one of keyed sketches, which near-duplicates share. The key is random and stays on this machine:
without it neither file tells whether a text is among them. So the same people's texts are noticed when they turn up
under another state folder, which would be a fresh budget for them, also when a space was added to each or a word
replaced. What was changed further is another text here; only the rule of one account for each state folder covers it.
"""

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fedloom.client.privacy.ledger.file import remedy
from fedloom.client.privacy.ledger.sketch import SIZE, Sketches, alike, normal, sketches
from fedloom.core.errors import LedgerError
from fedloom.core.runtime.durable import make_folder, write_durably

__all__ = ["claim"]

_SIZE = 16
"""Bytes of a digest: among 10⁹ texts two share one with probability 10⁻²¹."""

_SHARE = 0.25
"""Share of the smaller of two data sets from which on near-duplicates are no coincidence. Halves of one data set have
0.02 (sentences) to 0.05 (posts that quote), the forms of two hospitals 0.14; four words of each row replaced, 0.44."""


def claim(anchors: Path, account: str, texts: Sequence[str], *, written: bool = True) -> None:
    """Record that `texts` are charged to `account`, beside those recorded before; durable on return.

    Args:
        anchors: Folder of the records.
        account: Name of the account.
        texts: Of each row.
        written: Whether they are words. The fingerprint of a picture is like no other.

    Raises:
        LedgerError: Some of them, or near-duplicates of many, belong to another account of this machine, or the
            records cannot be used.
    """
    try:
        make_folder(anchors)
        with _locked(anchors / "examples.lock"):
            key = _key(anchors / "examples.key")
            plain = [normal(text) for text in texts]
            pairs = [(_digest(text, key), _digest(form, key)) for text, form in zip(texts, plain, strict=True)]
            mine = sketches(plain if written else [], key)
            for path in sorted(anchors.glob("*.examples")):
                if path.stem != account:
                    _refuse_shared(path, pairs)
                    _refuse_alike(path, mine)
            own = anchors / f"{account}.examples"
            _add(own, {each for pair in pairs for each in pair}, _SIZE)
            _add(own.with_suffix(".sketches"), {each.tobytes() for each in mine}, mine.itemsize * SIZE)
    except OSError as error:
        raise LedgerError(f"the records of examples in {anchors} cannot be used: {error}. {remedy(error)}") from error


def _digest(text: str, key: bytes) -> bytes:
    return hashlib.blake2b(text.encode(), key=key, digest_size=_SIZE).digest()


def _refuse_shared(path: Path, pairs: list[tuple[bytes, bytes]]) -> None:
    known = _read(path, _SIZE)
    if shared := sum(exact in known or plain in known for exact, plain in pairs):
        raise LedgerError(
            f"{shared} of {len(pairs)} texts are charged to another account of this machine, whose anchor "
            f"is {path.with_suffix('.anchor')}; set client.state to the folder that it names, so that "
            "both uses count together, or take these texts out of the data"
        )


def _refuse_alike(path: Path, mine: Sketches) -> None:
    # The first release kept no sketches.
    known = np.frombuffer(b"".join(_read(path.with_suffix(".sketches"), mine.itemsize * SIZE)), mine.dtype)
    known = known.reshape(-1, SIZE)
    close = int(alike(mine, known).sum())
    if close and close >= _SHARE * min(len(mine), len(known)):
        raise LedgerError(
            f"{close} of {len(mine)} texts are nearly those that are charged to another account of this machine, whose "
            f"anchor is {path.with_suffix('.anchor')}; set client.state to the folder that it names, so that both uses "
            "count together. If they are other people's, and only written after one pattern, give this client a folder "
            "of its own in client.anchors"
        )


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


def _read(path: Path, size: int) -> set[bytes]:
    """The records of one file, each of `size` bytes; none if there is no file."""
    content = path.read_bytes() if path.exists() else b""
    if len(content) % size:
        raise LedgerError(f"{path} is cut off; restore it from a backup")
    return {content[start : start + size] for start in range(0, len(content), size)}


def _add(path: Path, records: set[bytes], size: int) -> None:
    """Add to a file what it lacks. Records are sorted, so that they do not tell the order of the rows."""
    before = _read(path, size)
    if not records <= before:
        write_durably(path, *sorted(records | before))
