"""What a state directory keeps beside its logs: when each event was written, and how many bytes went over the wire.

For people to read. No decision is taken by it and no chain covers it, so a run comes to the same state whatever the
clock says and whenever its coordinator dies. A directory of an earlier build has none of it; its rounds then have no
times, and that is what is shown.
"""

import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Traffic", "begin_diary", "read_times", "read_traffic", "write_times", "write_traffic"]

Bytes = tuple[int, int]
"""Payload bytes down to and up from the clients, without framing."""

_TABLES = (
    "CREATE TABLE IF NOT EXISTS times (seq INTEGER PRIMARY KEY, at_s REAL NOT NULL)",
    "CREATE TABLE IF NOT EXISTS round_bytes (round INTEGER PRIMARY KEY, down INTEGER, up INTEGER)",
    "CREATE TABLE IF NOT EXISTS client_bytes (client TEXT PRIMARY KEY, down INTEGER, up INTEGER)",
)


@dataclass
class Traffic:
    """Bytes of the whole run, those counted before a restart included. Any thread may call it.

    Attributes:
        rounds: By round, from 0; the final adapter counts under the number of rounds.
        clients: By client.
    """

    rounds: dict[int, Bytes] = field(default_factory=dict)
    clients: dict[str, Bytes] = field(default_factory=dict)
    _changed_rounds: set[int] = field(default_factory=set)
    _changed_clients: set[str] = field(default_factory=set)
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def down(self, round: int, client: str, size_bytes: int) -> None:
        """Count what is sent to a client."""
        self._add(round, client, size_bytes, 0)

    def up(self, round: int, client: str, size_bytes: int) -> None:
        """Count what came from a client."""
        self._add(round, client, 0, size_bytes)

    @property
    def unwritten(self) -> bool:
        """Whether something was counted since `take`."""
        return bool(self._changed_rounds)

    def take(self) -> tuple[dict[int, Bytes], dict[str, Bytes]]:
        """The totals that have changed since the last call, by round and by client."""
        with self._mutex:
            rounds = {number: self.rounds[number] for number in self._changed_rounds}
            clients = {name: self.clients[name] for name in self._changed_clients}
            self._changed_rounds, self._changed_clients = set(), set()
        return rounds, clients

    def _add(self, round: int, client: str, down: int, up: int) -> None:
        with self._mutex:
            before = self.rounds.get(round, (0, 0))
            self.rounds[round] = before[0] + down, before[1] + up
            before = self.clients.get(client, (0, 0))
            self.clients[client] = before[0] + down, before[1] + up
            self._changed_rounds.add(round)
            self._changed_clients.add(client)


def begin_diary(db: sqlite3.Connection) -> None:
    """Make the tables where they are missing. Call it in a transaction."""
    for statement in _TABLES:
        db.execute(statement)


def write_times(db: sqlite3.Connection, first: int, count: int, at_s: float) -> None:
    """Keep when the events from number `first` on were written, seconds since 1970. Call it in their transaction."""
    db.executemany("INSERT OR REPLACE INTO times VALUES (?, ?)", [(first + index, at_s) for index in range(count)])


def write_traffic(db: sqlite3.Connection, rounds: Mapping[int, Bytes], clients: Mapping[str, Bytes]) -> None:
    """Keep new totals, see `Traffic.take`. Call it in a transaction."""
    db.executemany(
        "INSERT OR REPLACE INTO round_bytes VALUES (?, ?, ?)", [(key, *both) for key, both in rounds.items()]
    )
    db.executemany(
        "INSERT OR REPLACE INTO client_bytes VALUES (?, ?, ?)", [(key, *both) for key, both in clients.items()]
    )


def read_times(db: sqlite3.Connection, after: int = 0) -> dict[int, float]:
    """When each event after number `after` was written, by its number; those of earlier builds are missing."""
    if not _there(db):
        return {}
    rows = db.execute("SELECT seq, at_s FROM times WHERE seq > ? AND at_s BETWEEN 0.0 AND 1e11", (after,))
    return dict(rows.fetchall())


def read_traffic(db: sqlite3.Connection) -> Traffic:
    """The totals so far."""
    if not _there(db):
        return Traffic()
    sound = "typeof(down) = 'integer' AND typeof(up) = 'integer'"
    rounds = db.execute(f"SELECT round, down, up FROM round_bytes WHERE {sound}")  # a constant
    clients = db.execute(f"SELECT client, down, up FROM client_bytes WHERE {sound} AND typeof(client) = 'text'")
    return Traffic({row[0]: (row[1], row[2]) for row in rounds}, {row[0]: (row[1], row[2]) for row in clients})


def _there(db: sqlite3.Connection) -> bool:
    """Whether a build that keeps a diary has opened the directory."""
    return db.execute("SELECT 1 FROM sqlite_master WHERE name = 'client_bytes'").fetchone() is not None
