"""The outbox keeps the exact bytes of an update, or says that it does not."""

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.client.session.outbox import OutboxEntry, check_outbox, drop, keep, kept
from fedloom.client.session.terms import Terms
from fedloom.core.errors import LedgerError
from fedloom.core.runtime.durable import make_folder, write_durably
from fedloom.proto.messages import UpdateHeader

TERMS = Terms('{"run": "as\\nJSON"}', "e" * 64, 3, {"b": "0" * 64})


def update(payload: bytes = b"\n payload \0", run: str = "run-1", client: str = "a", round: int = 4) -> OutboxEntry:
    digest = hashlib.sha256(payload).hexdigest()
    return OutboxEntry(run, 7, UpdateHeader(client, round, "f" * 64, "fp32", len(payload), digest), payload, TERMS)


def test_what_is_kept_comes_back_byte_for_byte_and_once_dropped_no_more(tmp_path: Path) -> None:
    outbox = tmp_path / "deep" / "outbox"
    assert kept(outbox, "run-1", "a") is None
    drop(outbox, "run-1", "a")

    keep(outbox, update())
    assert kept(outbox, "run-1", "a") == update()
    assert kept(outbox, "run-2", "a") is None
    assert kept(outbox, "run-1", "b") is None

    drop(outbox, "run-1", "a")
    assert kept(outbox, "run-1", "a") is None
    assert list(outbox.iterdir()) == []


def test_a_later_update_takes_the_place_of_an_earlier_one_of_its_client_and_run_only(tmp_path: Path) -> None:
    keep(tmp_path, update())
    keep(tmp_path, update(run="run-2"))
    keep(tmp_path, update(client="b"))
    keep(tmp_path, update(b"later", round=5))

    assert kept(tmp_path, "run-1", "a") == update(b"later", round=5)
    assert kept(tmp_path, "run-2", "a") == update(run="run-2")
    assert kept(tmp_path, "run-1", "b") == update(client="b")
    assert len(check_outbox(tmp_path)) == 3


@settings(max_examples=20, deadline=None)
@given(run=st.text(max_size=40), payload=st.binary(max_size=100))
def test_a_run_of_any_name_stays_in_the_folder(
    tmp_path_factory: pytest.TempPathFactory, run: str, payload: bytes
) -> None:
    outbox = tmp_path_factory.mktemp("outbox")
    whole = update(payload, run)

    keep(outbox, whole)

    assert kept(outbox, run, "a") == whole
    assert [path.suffix for path in outbox.iterdir()] == [".update"]


def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path: Path) -> None:
    keep(tmp_path, update())
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()

    flipped = (content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in range(len(content)))
    for damaged in (*flipped, *(content[:i] for i in range(len(content))), content + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(LedgerError, match=r"waiting update .* is damaged .* is not sent; restore it, or remove"):
            kept(tmp_path, "run-1", "a")
        with pytest.raises(LedgerError, match=path.name):
            check_outbox(tmp_path)


def test_an_update_under_another_ones_name_is_refused(tmp_path: Path) -> None:
    keep(tmp_path, update())
    (mine,) = tmp_path.iterdir()
    keep(tmp_path / "other", update(client="b"))
    (other,) = (tmp_path / "other").iterdir()
    mine.write_bytes(other.read_bytes())

    with pytest.raises(LedgerError, match="it is of client 'b' in run 'run-1'"):
        kept(tmp_path, "run-1", "a")


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path, update())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LedgerError, match=r"cannot be written: .*No space left"):
        keep(tmp_path, update(b"later"))
    with pytest.raises(LedgerError, match="cannot be removed"):
        drop(tmp_path, "run-1", "a")


def test_a_file_is_synced_before_it_has_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fsync(handle: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{handle}"))
        content = target.read_bytes().decode() if target.is_file() else ""
        calls.append(f"fsync {target.name} {content}".strip())

    def replace(source: Path, target: Path) -> None:
        calls.append(f"replace {Path(source).name} {Path(target).name}")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)

    write_durably(tmp_path / "x", b"a", b"b")

    assert calls == ["fsync x.tmp ab", "replace x.tmp x", f"fsync {tmp_path.name}"]


def test_a_folder_is_made_with_the_name_of_every_folder_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(Path(os.readlink(f"/proc/self/fd/{handle}"))))
    folder = tmp_path / "a" / "b" / "c"

    make_folder(folder)
    assert folder.is_dir()
    assert set(synced) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}

    synced.clear()  # it is there, but whoever made it may have died before its name was on disk
    make_folder(folder)
    assert synced == [tmp_path / "a" / "b"]
