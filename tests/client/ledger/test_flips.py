"""A changed or missing byte in what a client must not forget: refused with the file's name, or without any effect.

`FEDLOOM_PROVE=1` changes every byte that is written, and cuts at many lengths. The outbox is tested elsewhere.
"""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedloom.client.privacy.ledger import ledger as module
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.secagg.unmasked import remember
from fedloom.core.errors import LedgerError
from fedloom.core.privacy.accounting import Spend

PROVE = os.environ.get("FEDLOOM_PROVE") == "1"
SAMPLES, CUTS = (10**9, 2000) if PROVE else (70, 23)
NAME = "ab" * 16


def damages(content: bytes, seed: str) -> Iterator[tuple[str, bytes]]:
    """Bytes changed where something is written, all or some, and cuts at some lengths."""
    rng = random.Random(seed)
    written = [at for at in range(len(content)) if content[at]]
    for at in sorted({*range(0, min(100, len(content)), 9), *rng.sample(written, min(SAMPLES, len(written)))}):
        yield f"byte {at}", content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :]
    for at in sorted(rng.sample(range(len(content)), min(CUTS, len(content)))):
        yield f"cut to {at}", content[:at]


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("image", ["killed", "closed"])
def test_a_changed_byte_in_a_ledger_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str) -> None:
    monkeypatch.setattr(module, "epsilon", lambda *_: 0.0)
    home, copies = tmp_path / "home", tmp_path / "copies"

    def opened() -> Ledger:
        return Ledger(home / "ledger", NAME, anchors=home / "anchors")

    with opened() as ledger:
        for round in range(3):
            ledger.release(ledger.reserve("run", round, Spend(0.05, 1.0, 20), budget=1.0, delta=1e-5), f"d{round}")
        known = ledger.entries
        shutil.copytree(home, copies / "killed")
    shutil.copytree(home, copies / "closed")
    sound = {
        path.relative_to(copies / image): path.read_bytes() for path in (copies / image).rglob("*") if path.is_file()
    }
    tried = refused = 0
    for inside in sorted(sound):
        if inside.suffix in (".lock", ".ledger-shm"):
            continue
        for how, content in damages(sound[inside], inside.name):
            tried += 1
            for stray in [path for path in home.rglob("*") if path.is_file() and path.relative_to(home) not in sound]:
                stray.unlink()
            for each, kept in sound.items():
                # In place: a ledger knows the file it was written to.
                (home / each).write_bytes(content if each == inside else kept)
            try:
                with opened() as ledger:
                    found, said = ledger.entries, ""
            except LedgerError as error:
                found, said = (), str(error)
            if said:
                assert inside.name.removesuffix("-wal") in said or f"{NAME}.ledger" in said, f"{inside} {how}: {said}"
                refused += 1
            else:
                # A database has bytes that say nothing; an anchor has none, and some are read only by an adoption.
                assert inside.suffix != ".anchor", f"{inside} {how} went unnoticed"
                assert found == known, f"{inside} {how} went unnoticed"
    print(f"{tried} changes of a ledger as a client that was {image} leaves it: {refused} refused, the file named")
    assert refused > 60


def test_a_changed_byte_in_what_was_revealed_is_found(tmp_path: Path) -> None:
    remember(tmp_path, "run", 3, "ab" * 32, ["ann", "ben"])
    (path,) = (tmp_path / "revealed").iterdir()
    content = path.read_bytes()
    for at in range(len(content)):
        for damaged in (content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], content[:at]):
            path.write_bytes(damaged)
            with pytest.raises(LedgerError, match=path.name):
                remember(tmp_path, "run", 4, "cd" * 32, ["ann", "ben"])
    path.write_bytes(content)
    remember(tmp_path, "run", 4, "cd" * 32, ["ann", "ben"])
