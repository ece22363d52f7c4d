"""Slow, silent and crumbling payloads, and memory that does not grow with those who send or read them."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from fedloom.core.errors import ProtocolError, StoreError, Unavailable
from fedloom.core.limits import CHUNK_BYTES, MIN_BYTES_PER_S, MIN_CHUNK_BYTES, TRANSFER_GRACE_S, TRANSFER_S
from fedloom.proto.frames import CHUNK_FIELD, DATA_FIELD, framed, unframed
from fedloom.proto.messages import UpdateHeader
from fedloom.server.rpc import streams as transfer
from fedloom.server.rpc import uploads as uploads_module
from fedloom.server.rpc.streams import Pace, Sender, paced, received
from fedloom.server.rpc.uploads import Upload, Uploads


@pytest.mark.parametrize(
    ("moves", "end_s"),
    [
        ([], TRANSFER_GRACE_S),  # nothing came
        ([(1.0, 1)], TRANSFER_GRACE_S + 1 / MIN_BYTES_PER_S),  # one byte buys next to nothing
        ([(1.0, 100 * CHUNK_BYTES)], 1.0 + TRANSFER_GRACE_S),  # much came, but then silence
        ([(second, 2 * MIN_BYTES_PER_S) for second in range(1000)], TRANSFER_S),  # no call lasts for ever
    ],
)
def test_a_payload_must_move(moves: list[tuple[float, int]], end_s: float) -> None:
    pace = Pace(0.0)
    for at_s, size_bytes in moves:
        pace.move(size_bytes, at_s)

    assert pace.end_s == pytest.approx(end_s)


def test_a_block_in_which_nothing_moves_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "TRANSFER_GRACE_S", 0.2)

    async def main() -> None:
        async with paced() as moved:
            moved(5)
            await asyncio.Event().wait()

    with pytest.raises(Unavailable, match=r"only 5 bytes have moved .* go on with the rest"):
        asyncio.run(main())


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield framed(DATA_FIELD, chunk)


@pytest.mark.parametrize(
    ("chunks", "text"),
    [
        ([bytes(MIN_CHUNK_BYTES - 1), bytes(5)], "all but the last have at least"),
        ([b""] * 3, "a chunk of 0 bytes"),
        ([bytes(MIN_CHUNK_BYTES)], "ended after 16384 bytes"),
    ],
)
def test_crumbs_and_missing_ends_are_refused(chunks: list[bytes], text: str) -> None:
    async def keep(data: memoryview) -> None:
        return None

    with pytest.raises(ProtocolError, match=text):
        asyncio.run(received(stream(*chunks), 2 * MIN_CHUNK_BYTES, keep))


def sent(readers: int, payload: bytes) -> tuple[int, list[bytes]]:
    """Send to many who do not read until all have been sent to: bytes then in flight, and what each got in the end."""

    async def main() -> tuple[int, list[bytes]]:
        sender, go = Sender(), asyncio.Event()
        got: list[list[bytes]] = [[] for _ in range(readers)]

        def write(parts: list[bytes]) -> Callable[[bytes], Awaitable[None]]:
            async def written(frame: bytes) -> None:
                parts.append(bytes(unframed(CHUNK_FIELD, frame)))
                await go.wait()

            return written

        tasks = [asyncio.create_task(sender.send(write(parts), payload, 3)) for parts in got]
        await asyncio.sleep(0)
        in_flight = sum(len(part) for parts in got for part in parts)
        go.set()
        await asyncio.gather(*tasks)
        return in_flight, [b"".join(parts) for parts in got]

    return asyncio.run(main())


def test_two_hundred_slow_readers_are_served_and_cost_little_more_than_forty() -> None:
    payload = bytes(range(256)) * 8192
    few, some = sent(40, payload)
    many, all_ = sent(200, payload)

    assert {*some, *all_} == {payload[3:]}
    assert many - few == 160 * (64 << 10)
    assert few < 33 * CHUNK_BYTES


def header(client: str = "ann", digest: str = "ab" * 32) -> UpdateHeader:
    return UpdateHeader(client, 0, "cd" * 32, "fp32", 100, digest)


def fill(uploads: Uploads, each: UpdateHeader, data: bytes, offset: int = 0) -> int:
    """Add data; how much there is afterwards."""
    upload, turn = uploads.take(each, 100, offset)
    uploads.add(upload, turn, memoryview(data))
    return upload.received


def test_uploads_share_a_bounded_memory_and_the_rest_lies_on_disk(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", memory_bytes=250)
    each = {name: bytes([number]) * 100 for number, name in enumerate(("ann", "ben", "cat", "dan"))}
    for name, data in each.items():
        fill(uploads, header(name), data[:60])
    for name, data in each.items():
        assert fill(uploads, header(name), data[60:], 60) == 100

    assert sorted(path.stat().st_size for path in (tmp_path / "uploads").iterdir()) == [100, 100]
    for name, data in each.items():
        assert uploads.payload(*uploads.take(header(name), 100, 100)) == data
        uploads.drop(name)
    assert list((tmp_path / "uploads").iterdir()) == []
    assert uploads.fits(uploads.take(header(), 100, 0)[0], 250)  # all room is free again


def test_a_parked_upload_costs_no_memory_and_outlives_the_process(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", memory_bytes=100)
    upload, turn = uploads.take(header(), 100, 0)
    uploads.add(upload, turn, memoryview(b"a" * 60))
    uploads.park(upload, turn)
    assert uploads.fits(uploads.take(header("ben"), 100, 0)[0], 100)

    again = Uploads(tmp_path / "uploads")
    assert again.take(header(digest="ef" * 32), 100, 100)[0].received == 0  # another update of hers is not this one
    upload, turn = again.take(header(), 100, 60)
    assert upload.received == 60
    again.add(upload, turn, memoryview(b"b" * 40))
    assert again.payload(upload, turn) == b"a" * 60 + b"b" * 40


def test_a_call_that_another_has_taken_over_adds_nothing(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path)
    old, turn = uploads.take(header(), 100, 0)
    uploads.add(old, turn, memoryview(b"a" * 60))
    new, later = uploads.take(header(), 100, 60)
    assert new is old

    for late in (lambda: uploads.add(old, turn, memoryview(b"x")), lambda: uploads.payload(old, turn)):
        with pytest.raises(ProtocolError, match="another call goes on"):
            late()
    uploads.park(old, turn)
    uploads.add(new, later, memoryview(b"b" * 40))
    assert uploads.payload(new, later) == b"a" * 60 + b"b" * 40


def test_a_client_has_one_upload_however_many_calls_begin_one_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2, timeout=0.2)

    class Met(Upload):
        def __init__(self, path: Path, size_bytes: int) -> None:
            with suppress(threading.BrokenBarrierError):
                both.wait()  # both at once are here only if nothing keeps them from it
            super().__init__(path, size_bytes)

    monkeypatch.setattr(uploads_module, "Upload", Met)
    for digests in (("ab" * 32, "ab" * 32), ("cd" * 32, "ef" * 32)):
        uploads = Uploads(tmp_path, memory_bytes=100)
        with ThreadPoolExecutor(2) as pool:
            begun = [pool.submit(uploads.take, header(digest=digest), 100, 0) for digest in digests]
            taken = [each.result() for each in begun]

        refused = 0
        for upload, turn in taken:
            try:
                uploads.add(upload, turn, memoryview(b"a" * 50))
            except ProtocolError:
                refused += 1
        assert refused == 1
        uploads.drop("ann")
        assert uploads.fits(uploads.take(header("ben"), 100, 0)[0], 100), "no room is lost"
        both.reset()


def test_more_than_was_announced_is_refused_and_a_new_beginning_forgets(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path)
    fill(uploads, header(), b"a" * 60)
    with pytest.raises(ProtocolError, match="at least 101 bytes of payload came; the header announced 100"):
        fill(uploads, header(), b"b" * 41, 60)
    assert fill(uploads, header(), b"c" * 10) == 10


def test_files_nobody_comes_back_for_are_deleted_and_all_when_the_run_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def park(name: str) -> None:
        uploads = Uploads(tmp_path, memory_bytes=0)
        fill(uploads, header(name), b"a" * 10)

    now_s = 1e9
    monkeypatch.setattr("fedloom.server.rpc.uploads.time.time", lambda: now_s)
    park("ann")
    now_s = max(path.stat().st_mtime for path in tmp_path.iterdir()) + 601
    park("ben")
    assert len(list(tmp_path.iterdir())) == 1

    Uploads(tmp_path).clear()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_says_which_file(tmp_path: Path) -> None:
    (tmp_path / "uploads").write_text("in the way")
    uploads = Uploads(tmp_path / "uploads", memory_bytes=0)

    with pytest.raises(StoreError, match=r"uploads/\w{64}.part: .*start the coordinator again"):
        fill(uploads, header(), b"a")
