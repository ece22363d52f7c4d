"""A log that is not exactly what was written is noticed, and the record is named."""

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.core.errors import StoreError
from fedloom.server.rounds.state import (
    AdapterCommitted,
    ClientLost,
    Event,
    RoundClosed,
    RoundOpened,
    RunCreated,
    UpdateAccepted,
    event_to_json,
)
from fedloom.server.storage.audit_log import AuditRecord
from fedloom.server.storage.hash_chain import beginning, link
from fedloom.server.storage.local import Store
from fedloom.server.storage.sqlite import FORMAT
from fedloom.server.storage.verify import look, verify

EVENTS: list[Event] = [
    RunCreated("4f", "spec", "schema", "s0"),
    RoundOpened(0, 0, "s0", ("ann", "ben", "cat"), 60.0),
    UpdateAccepted(0, "ann", "d-ann", 1.0),
    ClientLost(0, "ben", "lease"),
    UpdateAccepted(0, "cat", "d-cat", 2.0),
    RoundClosed(0, ("ann", "cat"), "complete"),
    AdapterCommitted(0, "s1"),
]
NOTES = [AuditRecord("2026-01-01T00:00:00+00:00", 1, "joined", name, "") for name in ("ann", "ben", "cat")]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with both logs filled and closed."""
    folder = tmp_path / "state"
    with Store(folder, durable=False) as store:
        store.append(*EVENTS[:4])
        store.note(*NOTES)
        store.append(*EVENTS[4:])
    return folder


def change(folder: Path, *statements: str) -> None:
    database = sqlite3.connect(folder / "run.db")
    with database:
        for statement in statements:
            database.execute(statement)
    database.close()


SWAP = "UPDATE {0} SET seq = -seq WHERE seq IN (2, 3)", "UPDATE {0} SET seq = 5 + seq WHERE seq < 0"
CHANGES: dict[str, tuple[tuple[str, ...], str]] = {
    "changed": (("UPDATE {0} SET body = replace(body, 'ann', 'eve') WHERE seq = 3",), "record 3"),
    "relinked": (("UPDATE {0} SET link = lower(hex(randomblob(32))) WHERE seq = 2",), "record 2"),
    "cut from the middle": (("DELETE FROM {0} WHERE seq = 2",), "record 2 of the log of {0} is missing"),
    "cut from the start": (("DELETE FROM {0} WHERE seq = 1",), "record 1 of the log of {0} is missing"),
    "cut at the end": (("DELETE FROM {0} WHERE seq = (SELECT max(seq) FROM {0})",), "missing"),
    "emptied": (("DELETE FROM {0}",), "missing"),
    "swapped": (SWAP, "record 2"),
    "appended": (("INSERT INTO {0} (body, link) SELECT body, link FROM {0} WHERE seq = 1",), "is not the one"),
}


@pytest.mark.parametrize("log", ["events", "audit"])
@pytest.mark.parametrize(("statements", "text"), CHANGES.values(), ids=CHANGES)
def test_a_tampered_log_is_refused_and_the_record_named(
    state: Path, log: str, statements: tuple[str, ...], text: str
) -> None:
    if (log, text) == ("audit", "record 3"):
        statements = ("UPDATE audit SET body = replace(body, 'cat', 'eve') WHERE seq = 3",)
    change(state, *(each.format(log) for each in statements))

    with pytest.raises(StoreError, match=text.format(log)):
        look(state)
    with pytest.raises(StoreError, match=f"log of {log}"), Store(state, durable=False) as store:
        store.events() if log == "events" else store.audit()


def test_a_log_that_lost_its_end_is_not_written_on(state: Path) -> None:
    change(state, "DELETE FROM events WHERE seq > 5", "UPDATE sqlite_sequence SET seq = 5 WHERE name = 'events'")
    mark = (state / "mark").read_bytes()

    with pytest.raises(StoreError, match="had 7 records once, and record 7 is missing"):
        Store(state)

    assert (state / "mark").read_bytes() == mark, "the evidence must stay"


def test_a_whole_forged_log_is_told_by_a_link_noted_before(state: Path) -> None:
    (noted,) = look(state).links[0][-1:]
    before = beginning("events")
    statements = []
    for number, event in enumerate(EVENTS, 1):
        body = event_to_json(event).replace("ben", "eve")
        before = link(before, body)
        statements.append(f"UPDATE events SET body = '{body}', link = '{before}' WHERE seq = {number}")
    change(state, *statements)
    mark = state / "mark"
    mark.write_bytes(mark.read_bytes().replace(noted.encode(), before.encode()))

    assert look(state).events[1] == RoundOpened(0, 0, "s0", ("ann", "eve", "cat"), 60.0), "a forger can do this"
    with pytest.raises(StoreError, match=f"no record has the link '{noted}"):
        verify(state, (noted,))


def test_an_update_filed_under_another_client_is_refused(state: Path) -> None:
    change(state, "UPDATE events SET update_client = 'eve' WHERE seq = 3")

    with pytest.raises(StoreError, match=r"record 3 .* filed under \(0, 'eve'\)"):
        look(state)


@pytest.mark.parametrize("spoil", [lambda b: b"", lambda b: b[:-2], lambda b: b.replace(b"7", b"8", 1), None])
def test_a_damaged_mark_is_refused(state: Path, spoil: Callable[[bytes], bytes] | None) -> None:
    mark = state / "mark"
    if spoil is None:
        mark.unlink()
    else:
        mark.write_bytes(spoil(mark.read_bytes()))

    with pytest.raises(StoreError, match=r"mark|record"):
        look(state)
    with pytest.raises(StoreError, match=r"mark|record"):
        Store(state)


def test_no_flipped_byte_of_the_write_ahead_log_goes_unnoticed(tmp_path: Path) -> None:
    """What a killed process leaves: SQLite drops the frames after a damaged one without a word."""
    live, dead = tmp_path / "live", tmp_path / "dead"
    with Store(live, durable=False) as store:
        for event in EVENTS:
            store.append(event)
        shutil.copytree(live, dead)
    size = (dead / "run.db-wal").stat().st_size
    assert size > 10_000
    intact = (dead / "run.db-wal").read_bytes()
    (dead / "run.db-shm").unlink()
    noticed = 0
    for at in range(0, size, 499):
        again = tmp_path / str(at)
        shutil.copytree(dead, again)
        (again / "run.db-wal").write_bytes(intact[:at] + bytes([intact[at] ^ 1]) + intact[at + 1 :])
        try:
            with Store(again, durable=False) as store:
                assert store.events() == EVENTS, f"byte {at}"
        except StoreError:
            noticed += 1
        shutil.rmtree(again)

    assert noticed > 10


def test_a_directory_of_the_format_before_is_taken_over(tmp_path: Path) -> None:
    tmp_path.joinpath("blobs").mkdir()
    change(
        tmp_path,
        "PRAGMA journal_mode=WAL",
        "CREATE TABLE opened (epoch INTEGER PRIMARY KEY AUTOINCREMENT)",
        "CREATE TABLE events (seq INTEGER PRIMARY KEY AUTOINCREMENT, update_round INTEGER, update_client TEXT, "
        "body TEXT NOT NULL)",
        "CREATE UNIQUE INDEX one_update ON events (update_round, update_client) WHERE update_round IS NOT NULL",
        "INSERT INTO opened DEFAULT VALUES",
        """INSERT INTO events (body) VALUES
            ('{"event":"RunCreated","run":"4f","spec":"spec","schema":"schema","state":"s0"}'),
            ('{"event":"RoundOpened","round":0,"attempt":0,"state":"s0","cohort":["ann"],"deadline_s":60.0}')""",
        """INSERT INTO events (update_round, update_client, body) VALUES
            (0, 'ann', '{"event":"UpdateAccepted","round":0,"client":"ann","digest":"d","weight":1.0}')""",
    )

    with pytest.raises(StoreError, match=r"format 0.*start its coordinator once"):
        look(tmp_path)
    with Store(tmp_path, durable=False) as store:
        assert store.epoch == 2
        assert store.events() == [
            RunCreated("4f", "spec", "schema", "s0"),
            RoundOpened(0, 0, "s0", ("ann",), 60.0),
            UpdateAccepted(0, "ann", "d", 1.0),
        ]
        assert store.accepted(0, "ann") is not None
        store.append(ClientLost(0, "ben", "left"))
    with Store(tmp_path, durable=False) as store:
        assert len(store.events()) == 4


def test_a_later_format_is_refused(state: Path) -> None:
    change(state, f"PRAGMA user_version={FORMAT + 1}")

    for opened in (lambda: Store(state), lambda: look(state)):
        with pytest.raises(StoreError, match=f"format {FORMAT + 1}.*version that wrote it"):
            opened()
