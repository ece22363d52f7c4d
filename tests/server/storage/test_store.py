import os
from pathlib import Path

import pytest

from fedloom.core.errors import StoreError
from fedloom.server.rounds.state import AdapterCommitted, ClientLost, UpdateAccepted
from fedloom.server.storage import sqlite as database
from fedloom.server.storage.local import Store


def test_sweeping_keeps_what_is_named_and_what_is_being_written(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        kept, dropped = store.put_blob(b"kept"), store.put_blob(b"dropped")
        half = tmp_path / "blobs" / "half.0.tmp"
        half.write_bytes(b"ha")

        store.sweep({kept})
        store.discard()

        assert {each.name for each in (tmp_path / "blobs").iterdir()} == {kept, half.name}
        assert store.get_blob(kept) == b"kept"
        assert half.exists()
        with pytest.raises(StoreError):
            store.get_blob(dropped)
    with Store(tmp_path):
        assert not half.exists()


def test_a_log_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(tmp_path) as store:
        monkeypatch.setattr(database, "event_to_json", lambda event: '{"event":"Quorum"}')
        store.append(ClientLost(3, "ben", "left"))

    with Store(tmp_path) as store, pytest.raises(StoreError, match="not an event of this version"):
        store.events()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.db").write_bytes(b"not a database, not at all" * 100)

    with pytest.raises(StoreError, match=r"run\.db|not a database"):
        Store(tmp_path)


def test_a_blob_is_synchronised_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(tmp_path) as store:
        steps: list[str] = []
        fsync, rename = os.fsync, Path.rename

        def traced_fsync(descriptor: int) -> None:
            steps.append("fsync")
            fsync(descriptor)

        def traced_rename(path: Path, target: Path) -> Path:
            steps.append("rename")
            return rename(path, target)

        monkeypatch.setattr(os, "fsync", traced_fsync)
        monkeypatch.setattr(Path, "rename", traced_rename)

        store.put_blob(b"weights")

    assert steps == ["fsync", "rename", "fsync"]


def test_a_store_that_need_not_last_never_synchronises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(os, "fsync", steps.append)

    with Store(tmp_path, durable=False) as store:
        store.put_blob(b"weights")

    assert steps == []


def test_a_full_disk_is_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with Store(tmp_path) as store:
        monkeypatch.setattr(os, "fsync", full)

        with pytest.raises(StoreError, match="No space left"):
            store.put_blob(b"weights")


def test_a_coordinator_that_was_replaced_writes_nothing_more(tmp_path: Path) -> None:
    """Found while writing the scenario "split brain": a lock that does not hold let two processes write one log."""
    update = UpdateAccepted(3, "ann", "d", 2.5)
    with Store(tmp_path) as old:
        (tmp_path / "lock").unlink()  # as where locks do not reach across machines
        with Store(tmp_path) as new:
            new.append(update)

            with pytest.raises(StoreError, match=r"epoch 1, and another coordinator has opened it since, as epoch 2"):
                old.append(AdapterCommitted(3, "s4"))

            assert new.events() == [update]
