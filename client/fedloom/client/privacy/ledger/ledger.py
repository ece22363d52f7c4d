"""The durable privacy account of a data set, kept by the client that owns it.

A state folder holds one account: whatever run, coordinator or adapter its data is used for, and however the data
grows, it is charged here. A charge is written and synced before any noisy result exists, so a crash at any moment
can only over-count.

The account is one SQLite file of entries that are only ever added, each bound to the one before it by a hash, and
an anchor outside that file; `anchor` says what the two detect, and what no machine can detect alone.
"""

import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from fedloom.client.privacy.ledger.anchor import Anchor, anchor_path, anchors_at, place_of, read_anchor, troubles
from fedloom.client.privacy.ledger.file import (
    REMEDY,
    add,
    connect,
    file_name,
    held,
    read_entries,
    remedy,
    stored_accounts,
)
from fedloom.client.privacy.ledger.hash_chain import (
    ADOPTED,
    CHARGED,
    DROPPED,
    FAILED,
    OPENED,
    OVER,
    RELEASED,
    Charge,
    Entry,
    account_of,
    charge_content,
    linked,
    note,
    totals,
)
from fedloom.core.errors import BudgetError, LedgerError, PolicyError
from fedloom.core.privacy.accounting import GRID, REPORT_GRID, Spend, Statement, epsilon, statement
from fedloom.core.runtime.durable import make_folder, sync_folder
from fedloom.core.runtime.failpoints import failpoint, reach

__all__ = ["MOST_FAILURES", "Ledger"]

log = logging.getLogger(__name__)

MOST_FAILURES = 3
"""Charges of a run, one after the other, that may come to nothing here before the site is asked to look."""


class Ledger:
    """The account of one data set.

    Use as a context manager. While it is open no other process can open the same account.
    """

    def __init__(self, folder: Path, name: str, *, anchors: Path | None = None) -> None:
        """Open the account `name` in `folder`, or create it if the folder has none.

        Args:
            folder: Where the ledger lies.
            name: The account's name, as `stored_accounts` gives it or, for a new one, the data set's digest.
            anchors: Where the anchor lies. None keeps it in `folder`, from where it witnesses against changes of
                the ledger alone, but not of the whole folder.

        Raises:
            LedgerError: Another process has it open, it is not known to be the newest state of this account, or
                the folder holds another one.
        """
        self.path = folder / file_name(name)
        self._anchors = folder if anchors is None else anchors
        try:
            make_folder(folder)
            make_folder(self._anchors)
        except OSError as error:
            raise LedgerError(f"ledger and anchor need the folders {folder} and {self._anchors}: {error}") from error
        self._lock = held(self.path)
        self._broken = False
        self._open: int | None = None
        try:
            self._check_alone()
            if not self.path.exists():
                self._check_not_lost()
            self._db = connect(self.path)
        except BaseException:
            os.close(self._lock)
            raise
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _check_alone(self) -> None:
        others = [other for other in stored_accounts(self.path.parent) if other != self.path.stem]
        if others:
            raise LedgerError(
                f"{self.path.parent} holds the account {others[0]}, not {self.path.stem}; all data of one state "
                "folder is charged to one account. For other people's data set client.state to another folder"
            )

    def _check_not_lost(self) -> None:
        """Refuse to begin where an anchor says that there was a ledger."""
        for anchor in anchors_at(self._anchors, self.path.parent):
            raise LedgerError(
                f"the ledger {anchor.name} of {self.path.parent}, of {anchor.sequence} entries, is gone or empty; its "
                f"anchor {anchor_path(self._anchors, anchor.account)} remains. {REMEDY}"
            )

    @failpoint("ledger.open")
    def _load(self) -> None:
        """Read the account and make sure that it is the newest state of it, or begin one."""
        self._entries: list[Entry] = []
        self._charges: dict[int, Charge] = {}
        try:
            entries, self._place = read_entries(self._db), place_of(self.path)
            if entries:
                self._continue(entries)
            else:
                self._begin()
        except (OSError, sqlite3.Error, LedgerError) as error:
            what = "trusted" if (say := remedy(error)) == REMEDY else "used"
            raise LedgerError(f"{self.path} cannot be {what}: {error}. {say}") from error

    def _continue(self, entries: list[Entry]) -> None:
        name, self.account = account_of(entries)
        if name != self.path.stem:
            raise LedgerError(f"it is the account {name}")
        anchor = read_anchor(anchor_path(self._anchors, self.account))
        wrong = troubles(entries, anchor, self._place)
        if wrong:
            raise LedgerError("; ".join(wrong))
        for entry in entries:
            self._note(entry)
        if anchor is None or anchor.sequence < len(entries):
            log.info("%s: the anchor was one entry behind, as a crash leaves it", self.path)
            self._anchor()

    def _begin(self) -> None:
        self._check_not_lost()
        self.account = secrets.token_hex(16)
        first = linked(None, OPENED, {"name": self.path.stem, "account": self.account}, time.time())
        add(self._db, [first])
        sync_folder(self.path.parent)
        self._note(first)
        self._anchor()

    @property
    def sequence(self) -> int:
        """Number of entries."""
        return len(self._entries)

    @property
    def head(self) -> str:
        """Hash of the last entry: who has seen it can tell later whether this history was rewritten."""
        return self._entries[-1].hash

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every entry, oldest first."""
        return tuple(self._entries)

    def charges(self) -> list[Charge]:
        """Every charge, oldest first."""
        return list(self._charges.values())

    def spends(self) -> list[Spend]:
        """All that was charged, oldest first."""
        return [spend for charge in self.charges() for spend in charge.spends]

    def epsilon(self, delta: float, grid: float = GRID) -> float:
        """Epsilon spent over the whole life of the data set: everything reserved, released or not."""
        return epsilon(self.spends(), delta, grid)

    def statement(self, delta: float, grid: float = REPORT_GRID, *, covers: str = "the life of this data") -> Statement:
        """The terms and the epsilon of all that was charged.

        Raises:
            ConfigError: There is no finite epsilon at this delta.
        """
        return statement(
            self.spends(), delta, grid, covers=covers, rounds=sum(not each.result for each in self.charges())
        )

    @failpoint("ledger.reserve")
    def reserve(
        self,
        run: str,
        round: int,
        spend: Spend,
        *,
        budget: float,
        delta: float,
        evaluation: Spend | None = None,
        noise_bands: int = 1,
    ) -> int:
        """Charge a round's training, and its evaluation if it has one, before the work starts; durable on return.

        Args:
            run: The run's name.
            round: Counted from 0.
            spend: What the training costs.
            budget: Epsilon that the account may come to.
            delta: Delta at which it is judged.
            evaluation: What the evaluation costs.
            noise_bands: Noted for readers; `spend` has counted them.

        Returns:
            The charge's number, for `release`.

        Raises:
            BudgetError: The account would exceed `budget` at `delta`; nothing is charged.
            PolicyError: An update for this round has already been released; a second one would be another
                noisy look at the same data. Or its work has failed here, or that of too many rounds before it. Nothing
                is charged.
        """
        if self._released(run, round) is not None:
            raise PolicyError(
                f"round {round + 1} of run {run!r} was answered before, and that answer is not kept any more; "
                "no round is answered with two different updates. Start the client again once the round is over. If "
                "the coordinator was put back to an earlier state, it never is, and the run cannot go on: its operator "
                "ends it with `fedloom operate finish`, or begins a new run"
            )
        self._check_failures(run, round)
        wanted = [spend] if evaluation is None else [spend, evaluation]
        self._check_budget(f"round {round + 1} of run {run!r}", wanted, budget, delta)
        self._open = self.append(CHARGED, charge_content(run, round, spend, evaluation, noise_bands=noise_bands))
        return self._open

    def reserve_result(self, run: str, rounds: int, spend: Spend, *, budget: float, delta: float) -> int:
        """Charge the scoring of the model that a run ended with, before it begins; durable on return.

        Returns:
            The charge's number, for `release`.

        Raises:
            BudgetError: The account would exceed `budget` at `delta`; nothing is charged.
            PolicyError: Something was charged for it, or for a round of its number, before. Nothing is charged.
        """
        if any((each.run, each.round) == (run, rounds) for each in self._charges.values()):
            raise PolicyError(f"the result of run {run!r} after {rounds} rounds was scored before, or more was trained")
        self._check_budget(f"scoring the result of run {run!r}", [spend], budget, delta)
        return self.append(CHARGED, charge_content(run, rounds, spend, result=True))

    def _check_budget(self, what: str, spends: list[Spend], budget: float, delta: float) -> None:
        after = epsilon([*self.spends(), *spends], delta)
        if after > budget:
            raise BudgetError(
                f"{what} would bring epsilon to {after:.4f} at delta {delta:g}; the policy "
                f"allows {budget:g} over the life of this data set, and {self.epsilon(delta):.4f} is spent. "
                "Leave the run, or raise privacy.epsilon in the policy if you may"
            )

    def evaluated(self, run: str, round: int) -> bool:
        """Whether an evaluation was charged for this round, released or not: there is one at most."""
        return any(each.evaluation for each in self._charges.values() if (each.run, each.round) == (run, round))

    @failpoint("ledger.release")
    def release(self, number: int, digest: str) -> None:
        """Note what leaves the client for a charge; durable on return, and before the first byte is sent.

        Raises:
            LedgerError: There is no such charge, or something else was already released for it or its round.
        """
        charge = self._charges.get(number)
        released = None if charge is None else self._released(charge.run, charge.round)
        if charge is not None and charge.digest == digest:
            return
        if charge is None or released is not None:
            raise LedgerError(f"charge {number} of {self.path} is unknown or already released with other content")
        self.append(RELEASED, {"charge": number, "digest": digest})
        self._open = None

    def drop(self, why: str | None) -> bool:
        """Give up the charge that was made last from here, if nothing was released for it.

        Args:
            why: `FAILED` or `OVER`, noted durably; None notes nothing, and the round may be charged again.

        Returns:
            Whether there is such a charge.

        Raises:
            LedgerError: The disk refuses.
        """
        number, self._open = self._open, None
        if number is not None and why is not None:
            self.append(DROPPED, {"charge": number, "why": why})
        return number is not None

    def failures(self, run: str) -> int:
        """How many charges of a run have come to nothing since the last one that was released, or adopted by hand.

        A round that was closed without this client does not count: its work might have been done.
        """
        adopted = max((entry.number for entry in self._entries if entry.kind == ADOPTED), default=0)
        count = 0
        for charge in self._charges.values():
            if charge.run == run and charge.number > adopted and charge.dropped != OVER:
                count = count + 1 if charge.digest is None else 0
        return count

    def stopped(self) -> list[str]:
        """Names of the runs in which so many charges came to nothing that no more is charged for them."""
        runs = dict.fromkeys(charge.run for charge in self._charges.values())
        return [run for run in runs if self.failures(run) >= MOST_FAILURES]

    def _check_failures(self, run: str, round: int) -> None:
        if self.failures(run) >= MOST_FAILURES:
            raise PolicyError(
                f"the last {MOST_FAILURES} charges for run {run!r} came to nothing: the client failed or was killed in "
                "each of those rounds, and training on would spend the budget for nothing. Look in the client's log "
                "and the system's for why, put it right, and say so with `fedloom ledger recover`, which lets it go on"
            )
        if any((each.run, each.round, each.dropped) == (run, round, FAILED) for each in self._charges.values()):
            raise PolicyError(
                f"the work of round {round + 1} of run {run!r} has failed here after it was charged, and is not done "
                "and charged again. Start the client again once the round is over"
            )

    def _released(self, run: str, round: int) -> str | None:
        """Digest of the update that was released for this round, if any."""
        digests = [each.digest for each in self._charges.values() if (each.run, each.round) == (run, round)]
        return next((digest for digest in digests if digest is not None), None)

    def append(self, kind: str, content: Mapping[str, object]) -> int:
        """Add an entry; it and the anchor are durable on return.

        Returns:
            The entry's number.

        Raises:
            LedgerError: The disk refuses, now or before. Whether the entry is on disk is then unknown, so nothing
                may be sent, and only opening the ledger anew can tell.
        """
        if self._broken:
            raise LedgerError(f"{self.path} could not be written before; start the client anew")
        entry = linked(self._entries[-1], kind, content, time.time())
        self._broken = True  # until both writes are known to have succeeded, whatever stops them
        try:
            add(self._db, [entry])
            reach("ledger.added")
            self._note(entry)
            self._anchor()
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(
                f"{self.path} or its anchor cannot be written: {error}; free the disk and start the client anew"
            ) from error
        reach("ledger.appended")
        self._broken = False
        return entry.number

    def _note(self, entry: Entry) -> None:
        self._entries.append(entry)
        note(self._charges, entry)

    def _anchor(self) -> None:
        steps = totals(self._charges.values())
        Anchor(self.account, self.path.stem, self._place, self.sequence, self.head, steps).write(self._anchors)

    def close(self) -> None:
        """Release the file and its lock."""
        self._db.close()
        os.close(self._lock)

    def __enter__(self) -> "Ledger":
        """The open ledger."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()
