"""An operator's way forward with a ledger that is not trusted: say why, lose no known charge, and go on."""

import os
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedloom.client.privacy.ledger.anchor import Anchor, anchor_path, anchors_at, place_of, read_anchor
from fedloom.client.privacy.ledger.file import add, connect, file_name, held, read_entries, stored_accounts
from fedloom.client.privacy.ledger.hash_chain import (
    ADOPTED,
    CHARGED,
    OPENED,
    Entry,
    account_of,
    charge_content,
    charges_of,
    linked,
    totals,
    unlinked,
)
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.core.errors import LedgerError
from fedloom.core.privacy.accounting import Spend
from fedloom.core.runtime.durable import sync_folder

__all__ = ["Recovered", "recover"]

_RUN = "adopted"
"""What stands in place of a run's name for charges that an adoption makes."""


@dataclass(frozen=True)
class Recovered:
    """What an adoption did.

    Args:
        path: The ledger.
        found: What was wrong with it; "" if nothing was.
        restored: Steps charged because the anchor, or a ledger that is not trusted any more, knew of them.
        declared: Steps charged because the operator said so.
        aside: Where the untrusted file was moved; None if it was kept as the ledger.
    """

    path: Path
    found: str
    restored: tuple[Spend, ...]
    declared: tuple[Spend, ...]
    aside: Path | None


def recover(folder: Path, anchors: Path, *, reason: str, spent: Sequence[Spend] | None) -> Recovered:
    """Make the ledger of `folder` the account's trusted state again, and write down who said so.

    A ledger whose entries are sound stays; any other is moved aside, never deleted, and a new one takes its place.
    Either way the account is charged no less than the ledger and its anchor know of, and `spent` on top.

    Args:
        folder: The ledger's folder.
        anchors: The anchors' folder.
        reason: The operator's words, kept in the ledger.
        spent: What was spent on the data without this ledger knowing; empty says that nothing was. None says
            nothing, which is not enough if neither ledger nor anchor can be read.

    Raises:
        LedgerError: The account is in use; it is sound and nothing was declared; or nothing is known of it.
    """
    name = _name(folder, anchors)
    path = folder / file_name(name)
    found = _found(folder, name, anchors)
    if not found and not spent:
        raise LedgerError(
            f"{path} is sound; there is nothing to recover. Use --spent to charge what it does not know of"
        )
    lock = held(path)
    try:
        return _adopt(path, anchors, found, reason, spent)
    finally:
        os.close(lock)


def _name(folder: Path, anchors: Path) -> str:
    names = stored_accounts(folder)
    if len(names) > 1:
        raise LedgerError(f"{folder} holds the ledgers {', '.join(names)}; move all but the account's own elsewhere")
    known = [anchor.name for anchor in anchors_at(anchors, folder)]
    return (names or known or ["declared"])[0]


def _found(folder: Path, name: str, anchors: Path) -> str:
    """Why the account is not trusted, or does not go on; "" if nothing keeps it."""
    if not (folder / file_name(name)).exists() and not anchors_at(anchors, folder):
        return "there was no ledger"
    try:
        with Ledger(folder, name, anchors=anchors) as ledger:
            stopped = ledger.stopped()
    except LedgerError as error:
        return str(error)
    return f"charges for {', '.join(map(repr, stopped))} came to nothing" if stopped else ""


def _adopt(path: Path, anchors: Path, found: str, reason: str, spent: Sequence[Spend] | None) -> Recovered:
    entries = _readable(path)
    anchor = _anchor(path, anchors, entries)
    kept = entries if entries and unlinked(entries) is None else []
    if not kept and anchor is None and spent is None:
        raise LedgerError(
            f"nothing is known of what {path} had charged; declare it with --spent RATE:NOISE:STEPS, as an exported "
            "statement lists it under mechanisms, or with --spent nothing if these data were never trained on"
        )
    before = totals(charges_of(kept).values())
    known = totals(charges_of(entries).values()) | (anchor.steps if anchor else Counter())  # the larger of each
    restored = tuple(Spend(rate, noise, steps) for (rate, noise), steps in sorted((known - before).items()))
    declared = tuple(spent or ())
    aside = None if kept else _set_aside(path)
    account = account_of(kept)[1] if kept else anchor.account if anchor else secrets.token_hex(16)
    chain = list(kept) or [linked(None, OPENED, {"name": path.stem, "account": account}, time.time())]
    chain.append(linked(chain[-1], ADOPTED, {"reason": reason, "found": found}, time.time()))
    for spend in (*restored, *declared):
        chain.append(linked(chain[-1], CHARGED, charge_content(_RUN, 0, spend), time.time()))
    db = connect(path)
    try:
        # One transaction, and the old anchor until it is done: a crash before leaves what an adoption starts from.
        add(db, chain[len(kept) :])
    finally:
        db.close()
    sync_folder(path.parent)
    steps = totals(charges_of(chain).values())
    Anchor(account, path.stem, place_of(path), len(chain), chain[-1].hash, steps).write(anchors)
    return Recovered(path, found, restored, declared, aside)


def _readable(path: Path) -> list[Entry]:
    """What can be read of the ledger; an account that is not this file's counts as nothing."""
    if not path.exists():
        return []
    try:
        db = connect(path)
        try:
            entries = read_entries(db)
            charges_of(entries)
            return entries if entries and account_of(entries)[0] == path.stem else []
        finally:
            db.close()
    except (LedgerError, sqlite3.Error):
        return []


def _set_aside(path: Path) -> Path | None:
    """Rename the file and SQLite's two beside it, so that none of them is taken for the new ledger's."""
    if not path.exists():
        return None
    number = next(n for n in range(1, 10**6) if not path.with_name(f"{path.name}.refused-{n}").exists())
    aside = path.with_name(f"{path.name}.refused-{number}")
    for ending in ("-wal", "-shm", ""):
        beside = path.with_name(path.name + ending)
        if beside.exists():
            os.replace(beside, f"{aside}{ending}")
    sync_folder(path.parent)
    return aside


def _anchor(path: Path, anchors: Path, entries: Sequence[Entry]) -> Anchor | None:
    """The account's anchor, found by its id or else by its folder."""
    if entries:
        try:
            return read_anchor(anchor_path(anchors, account_of(entries)[1]))
        except LedgerError:
            return None
    return next((anchor for anchor in anchors_at(anchors, path.parent) if anchor.name == path.stem), None)
