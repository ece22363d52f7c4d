"""A changed or missing byte in any file of a state directory: found and named, or without any effect.

`FEDLOOM_PROVE=1` tries thousands of places in each file, all frame headers among them; otherwise some 300 in all.
"""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedloom.core.errors import FedloomError, ProtocolError, StoreError
from fedloom.proto.messages import Assignment
from fedloom.server.storage.local import Store
from tests.faults_server.serving import NAMES, Acknowledged, finish, open_coordinator, update

PROVE = os.environ.get("FEDLOOM_PROVE") == "1"
SAMPLES = 3000 if PROVE else 60

# SQLite makes the shared memory anew, and the lock is empty.
NO_CONTENT = ("run.db-shm", "lock")


def grown(folder: Path, images: Path) -> Acknowledged:
    """A run in its second round with one update there, with copies as a crash and as a clean end leave it."""
    acknowledged: Acknowledged = []
    with Store(folder) as store:
        coordinator = open_coordinator(store)
        places = {}
        for name in NAMES:
            joined = coordinator.join(name, 1, 0)
            places[name] = joined.run, joined.epoch
            coordinator.work(name, *places[name])
        for name in ("ann", "ben", "ann"):
            answer = coordinator.work(name, *places[name])
            assert isinstance(answer, Assignment)
            sent = update(name, answer)
            assert coordinator.submit(*sent, *places[name]) is False
            acknowledged.append(sent)
        store.discard()
        shutil.copytree(folder, images / "killed")
    shutil.copytree(folder, images / "closed")
    return acknowledged


def places(content: bytes, name: str) -> Iterator[int]:
    """Bytes to change: all, or the beginning, the frame headers of a write-ahead log, and some others."""
    size = len(content)
    if size <= SAMPLES:
        yield from range(size)
        return
    rng = random.Random(name)
    heads = [32 + 4120 * frame + byte for frame in range((size - 32) // 4120) for byte in (2, 6, 9, 17)]
    some = {*range(0, 100, 7), *(heads if name.endswith("-wal") else ()), size - 1, size // 2}
    # Pages are mostly empty: look where something is written.
    written = [index for index in range(size) if content[index]]
    yield from sorted(some | set(rng.sample(written, min(SAMPLES, len(written)))))


def cuts(content: bytes, name: str) -> Iterator[int]:
    size = len(content)
    yield from (
        range(size) if size <= SAMPLES else sorted(random.Random(name).sample(range(size), min(SAMPLES // 3, size)))
    )


def damaged(content: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    """The file with one change each, and what that is."""
    for at in places(content, name):
        yield f"byte {at}", content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :]
    for at in cuts(content, name):
        yield f"cut to {at}", content[:at]


@pytest.mark.slow
@pytest.mark.prove
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("image", ["killed", "closed"])
def test_a_changed_byte_is_found_and_its_file_is_named(tmp_path: Path, image: str) -> None:
    acknowledged = grown(tmp_path / "grown", tmp_path)
    sound, state = tmp_path / image, tmp_path / "state"
    expected = finish(shutil.copytree(sound, state), acknowledged)
    tried = refused = 0
    for path in sorted(path for path in sound.rglob("*") if path.is_file() and path.name not in NO_CONTENT):
        content, inside = path.read_bytes(), path.relative_to(sound)
        for how, bytes_ in damaged(content, path.name):
            tried += 1
            shutil.rmtree(state)
            (shutil.copytree(sound, state) / inside).write_bytes(bytes_)
            try:
                found, said = finish(state, acknowledged), ""
            except StoreError as error:
                found, said = "", str(error)
            if said:
                assert path.name.removesuffix("-wal") in said or "run.db" in said, f"{inside} {how}: {said}"
                refused += 1
            else:
                assert found == expected, f"{inside} {how} went unnoticed"
    print(
        f"{tried} changes of the state as a coordinator that was {image} leaves it: {refused} refused, the file named"
    )
    assert refused > 100


def test_every_changed_byte_of_an_update_on_its_way_is_found(tmp_path: Path) -> None:
    with Store(tmp_path / "state", durable=False) as store:
        coordinator = open_coordinator(store)
        for name in NAMES:
            joined = coordinator.join(name, 1, 0)
            answer = coordinator.work(name, joined.run, joined.epoch)
        assert isinstance(answer, Assignment)
        header, payload = update("ben", answer)
        for at in range(len(payload)):
            changed = payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :]
            with pytest.raises(ProtocolError, match="digest in its header; send it again"):
                coordinator.submit(header, changed, joined.run, joined.epoch)
            with pytest.raises(FedloomError, match=f"update of {at} bytes"):
                coordinator.submit(header, payload[:at], joined.run, joined.epoch)
        assert coordinator.submit(header, payload, joined.run, joined.epoch) is False
