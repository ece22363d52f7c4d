"""What every `Storage` must do. A new one gets a subclass below that says how to open it and how to spoil it."""

import hashlib
import sqlite3
import threading
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from fedloom.core.errors import StoreError
from fedloom.server.rounds.state import AdapterCommitted, ClientLost, Event, UpdateAccepted
from fedloom.server.storage.api import Storage
from fedloom.server.storage.audit_log import AuditRecord
from fedloom.server.storage.local import Store

UPDATE = UpdateAccepted(3, "ann", "d", 2.5)
NOTE = AuditRecord("2026-01-01T00:00:00+00:00", 1, "joined", "ann", "")


class StorageSuite(ABC):
    """The tests; a subclass whose name begins with Test runs them."""

    @abstractmethod
    def opened(self, folder: Path) -> AbstractContextManager[Storage]:
        """The state kept under this folder's name, made if need be."""

    @abstractmethod
    def spoil_blob(self, folder: Path, digest: str) -> None:
        """Change one byte of a blob behind the store's back; the state is closed."""

    @abstractmethod
    def spoil_event(self, folder: Path) -> None:
        """Change one stored event behind the store's back; the state is closed."""

    def test_what_was_written_is_there_after_reopening(self, tmp_path: Path) -> None:
        events: list[Event] = [ClientLost(3, "ben", "left"), UPDATE, AdapterCommitted(3, "s4")]
        with self.opened(tmp_path) as store:
            store.append(*events[:2])
            store.append(events[2])
            store.note(NOTE)
            digest = store.put_blob(b"weights")
            assert digest == hashlib.sha256(b"weights").hexdigest()
            assert store.put_blob(b"weights", digest) == digest
        with self.opened(tmp_path) as store:
            assert store.events() == events
            assert store.audit() == [NOTE]
            assert store.get_blob(digest) == b"weights"
            assert (store.accepted(3, "ann"), store.accepted(3, "ben"), store.accepted(2, "ann")) == (
                UPDATE,
                None,
                None,
            )

    def test_each_opening_counts_an_epoch(self, tmp_path: Path) -> None:
        epochs = []
        for _ in range(3):
            with self.opened(tmp_path) as store:
                epochs.append(store.epoch)
                assert store.where
        assert epochs == [1, 2, 3]

    def test_one_coordinator_at_a_time(self, tmp_path: Path) -> None:
        with self.opened(tmp_path), pytest.raises(StoreError, match="another coordinator"), self.opened(tmp_path):
            pass

    def test_a_second_update_for_a_round_is_refused_with_all_that_came_beside_it(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as store:
            store.append(UPDATE)
            with pytest.raises(StoreError):
                store.append(AdapterCommitted(3, "s4"), UpdateAccepted(3, "ann", "other", 1.0))
            assert store.events() == [UPDATE]
            store.append(UpdateAccepted(4, "ann", "d", 1.0))
        with self.opened(tmp_path) as store:
            assert len(store.events()) == 2

    def test_two_threads_never_both_get_an_update_in(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as store:
            results: list[bool] = []

            def put(number: int) -> None:
                try:
                    store.append(UpdateAccepted(0, "ann", f"d{number}", 1.0))
                    results.append(True)
                except StoreError:
                    results.append(False)

            threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(results) == [False] * 7 + [True]
            assert len(store.events()) == 1

    def test_sweeping_forgets_all_but_what_is_named(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as store:
            kept, dropped = store.put_blob(b"kept"), store.put_blob(b"dropped")
            store.sweep({kept})
            store.discard()
            assert store.get_blob(kept) == b"kept"
            with pytest.raises(StoreError, match=dropped):
                store.get_blob(dropped)

    def test_a_changed_blob_is_noticed_and_named(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as store:
            digest = store.put_blob(b"weights")
        self.spoil_blob(tmp_path, digest)
        with self.opened(tmp_path) as store, pytest.raises(StoreError, match=digest):
            store.get_blob(digest)

    def test_a_changed_event_is_noticed_and_named(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as store:
            store.append(UPDATE, AdapterCommitted(3, "s4"))
        self.spoil_event(tmp_path)
        with pytest.raises(StoreError, match="record"), self.opened(tmp_path) as store:
            store.events()


class TestStore(StorageSuite):
    """The store on a local directory, synchronised."""

    durable = True

    def opened(self, folder: Path) -> Store:
        return Store(folder, durable=self.durable)

    def spoil_blob(self, folder: Path, digest: str) -> None:
        path = folder / "blobs" / digest
        path.write_bytes(path.read_bytes()[:-1] + b"z")

    def spoil_event(self, folder: Path) -> None:
        connection = sqlite3.connect(folder / "run.db")
        with connection:
            connection.execute("UPDATE events SET body = replace(body, 's4', 's5')")
        connection.close()


class TestHastyStore(TestStore):
    """The same without any synchronisation."""

    durable = False
