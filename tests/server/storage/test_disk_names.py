"""A file survives a power cut only if its name does: the folder it was given its name in is synchronised too."""

import os
import threading
from pathlib import Path

import pytest

from fedloom.server.storage.local import Store


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every path that is synchronised, in order."""
    paths: list[Path] = []
    fsync = os.fsync

    def traced(descriptor: int) -> None:
        paths.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", traced)
    return paths


def test_every_folder_that_is_made_gets_a_durable_name(tmp_path: Path, synced: list[Path]) -> None:
    Store(tmp_path / "runs" / "trial" / "state").close()

    assert {tmp_path, tmp_path / "runs", tmp_path / "runs" / "trial", tmp_path / "runs" / "trial" / "state"} <= set(
        synced
    )
    synced.clear()
    Store(tmp_path / "runs" / "trial" / "state").close()
    assert synced == [tmp_path / "runs" / "trial" / "state"]


def test_a_blob_that_another_thread_is_still_naming_is_durable_on_return(
    tmp_path: Path, synced: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    named, go_on, rename = threading.Event(), threading.Event(), Path.rename

    def slow(path: Path, target: Path) -> Path:
        done = rename(path, target)
        named.set()
        assert go_on.wait(30)
        return done

    with Store(tmp_path) as store:
        monkeypatch.setattr(Path, "rename", slow)
        first = threading.Thread(target=store.put_blob, args=(b"the same from two clients",))
        first.start()
        assert named.wait(30)
        synced.clear()
        store.put_blob(b"the same from two clients")
        before_the_first_goes_on = list(synced)
        go_on.set()
        first.join()

    assert before_the_first_goes_on == [tmp_path / "blobs"]
