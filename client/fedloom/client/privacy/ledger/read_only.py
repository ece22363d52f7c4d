"""A look at an account while its client has it open."""

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from fedloom.client.privacy.ledger.file import file_name, read_entries
from fedloom.client.privacy.ledger.hash_chain import Charge, Entry, account_of, unlinked
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.core.errors import LedgerError

__all__ = ["Glance"]


class Glance(Ledger):
    """An account as it stands now; nothing can be charged, and the client that has it open is not disturbed.

    That it is the newest state of the account was checked when that client opened it; here its chain of entries is.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Read the account `name` in `folder`.

        Raises:
            LedgerError: It cannot be read, or its entries do not follow from each other.
        """
        self.path = folder / file_name(name)
        self._entries: list[Entry] = []
        self._charges: dict[int, Charge] = {}
        try:
            with closing(sqlite3.connect(f"file:{quote(str(self.path))}?mode=ro", uri=True)) as db:
                entries = read_entries(db)
        except sqlite3.Error as error:
            raise LedgerError(
                f"{self.path} cannot be read while a client runs: {error}; stop it, and try again"
            ) from error
        if (wrong := unlinked(entries)) is not None:
            raise LedgerError(f"{self.path}: entry {wrong} is not the one that was written")
        self.account = account_of(entries)[1]
        for entry in entries:
            self._note(entry)

    def append(self, kind: str, content: Mapping[str, object]) -> int:
        """Refused.

        Raises:
            LedgerError: Always.
        """
        raise LedgerError(f"{self.path} is only looked at; nothing is written")

    def close(self) -> None:
        """Nothing is held."""
