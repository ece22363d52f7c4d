"""A real coordinator on a disk that fails or fills up, or that is killed at any of its writes.

`strace` puts the fault into one system call of a whole run. Whatever call it is: what was acknowledged is there after
a restart, a failed write stops the coordinator with the file's name, and the run then ends with the same adapter.
`FEDLOOM_PROVE=1` takes every call of the run in turn instead of a few.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from fedloom.proto.messages import Assignment
from tests.faults_server.serving import NAMES, Acknowledged, Client, coordinator_process, finish, update

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (apt-get install strace)")

PROVE = os.environ.get("FEDLOOM_PROVE") == "1"
CALLS = ("fsync", "fdatasync", "rename", "pwrite64", "write")
FAULTS = ("error=EIO", "signal=SIGKILL")
# A commit that fails stops the server, which cancels the calls that outlast its grace. Clients retry all of these.
ENDINGS = (None, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED)


@dataclass
class Ended:
    """How a coordinator process ended, and what it had acknowledged until then."""

    code: int
    text: str
    acknowledged: Acknowledged
    done: bool


def strace(trace: Path, *options: str) -> list[str]:
    # Only calls that are traced cost time with a filter, but behind one strace cannot deliver a signal.
    filtered = [] if any("signal=" in option for option in options) else ["--seccomp-bpf"]
    return ["strace", "-f", *filtered, "-yy", "-qq", "-o", str(trace), *options]


def run(state: Path, *prefix: str, one_thread: bool = False) -> Ended:
    """Two clients through the whole run, one call after the other, or until the coordinator is gone."""
    acknowledged: Acknowledged = []
    done, status = False, None
    with coordinator_process(state, prefix=prefix, one_thread=one_thread) as process:
        assert process.stdout is not None
        if address := process.stdout.readline().strip():
            clients = [Client(address, name) for name in NAMES]
            try:
                for client in clients:
                    client.join()
                for _ in range(2):
                    for client, assignment in zip(clients, assignments(clients), strict=True):
                        sent = update(client.name, assignment)
                        assert client.submit(*sent) is False
                        acknowledged.append(sent)
                done = clients[0].final() == clients[1].final()
            except grpc.RpcError as error:
                status = error.code()
            for client in clients:
                client.channel.close()
        _, text = process.communicate(timeout=60)
    assert status in ENDINGS, f"{status}: {text}"
    return Ended(process.returncode, text, acknowledged, done)


def assignments(clients: list[Client]) -> list[Assignment]:
    """What both are asked to do; the round opens once both have asked."""
    asked = [client.ask() for client in clients]
    answers = [client.answer(each) for client, each in zip(clients, asked, strict=True)]
    assert all(isinstance(answer, Assignment) for answer in answers)
    return [answer for answer in answers if isinstance(answer, Assignment)]


@dataclass(frozen=True)
class Point:
    """One system call of the undisturbed run."""

    call: str
    when: int
    path: str


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> list[Point]:
    """Every call by which the undisturbed run changes its state, in order."""
    folder = tmp_path_factory.mktemp("undisturbed")
    state = folder / "state"
    ended = run(state, *strace(folder / "trace", "-e", f"trace={','.join(CALLS)}"), one_thread=True)
    assert (ended.code, ended.done) == (0, True), ended.text
    found: list[Point] = []
    counts = dict.fromkeys(CALLS, 0)
    for line in (folder / "trace").read_text(errors="replace").splitlines():
        call = re.match(r"\d+ +(\w+)\(", line)
        path = re.search(rf"{state.parent}(/[\w./-]*)?", line)
        if call is None or path is None:
            continue
        counts[call[1]] += 1
        # Other files are written too, so a write is named by its file, which is written once.
        when = 1 if call[1] == "write" else counts[call[1]]
        found.append(Point(call[1], when, path[0].removeprefix(str(state))))
    assert sum("blobs" in point.path for point in found) > 20, (folder / "trace").read_text(errors="replace")[-3000:]
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the state at the end of an undisturbed run."""
    return finish(tmp_path_factory.mktemp("expected"))


def chosen(points: list[Point]) -> Iterator[tuple[Point, str]]:
    for call in CALLS:
        mine = [point for point in points if point.call == call]
        assert len(mine) >= 6, f"{call} occurs too seldom to mean anything"
        for fault in FAULTS:
            for index, point in enumerate(mine):
                # Two of each kind, at places that differ between kinds, unless all are wanted.
                if PROVE or index in (len(mine) // 2, (len(call) + 7 * len(fault)) % len(mine)):
                    yield point, fault


@pytest.mark.slow
@needs_strace
@pytest.mark.e2e
@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_a_fault_at_any_write_loses_nothing_that_was_acknowledged(
    tmp_path: Path, points: list[Point], expected: str
) -> None:
    killed = stopped = 0
    for number, (point, fault) in enumerate(chosen(points)):
        state, trace = tmp_path / str(number), tmp_path / "trace"
        where = ["-P", f"{state}{point.path}"] if point.call == "write" else []
        inject = f"inject={point.call}:{fault}:when={point.when}"
        ended = run(state, *strace(trace, *where, "-e", f"trace={point.call}", "-e", inject), one_thread=True)
        said = f"{point} {fault}: exit {ended.code}: {ended.text[-500:]}"

        # Audit records are written when there is time, so a run may be over before its n-th call.
        assert ended.code != 0 or ended.done, said
        if fault == "signal=SIGKILL":
            killed += ended.code != 0
        elif failed := injected(trace, state):
            path, later = failed
            if path == "/run.db-shm":
                pass  # shared memory, which SQLite makes anew: nothing in it has to last
            elif (point.call, path) != ("fdatasync", ""):
                assert later <= 1, f"{later} writes to a disk that has failed: {said}"
            else:
                # SQLite synchronises its folder for its own files and does not mind; the store does that after it.
                assert ended.code == 0, said
            if ended.code != 0:
                assert re.search(rf"StoreError: {state}\S*: ", ended.text), said
                stopped += 1
        assert finish(state, ended.acknowledged) == expected, said
    print(f"{number + 1} faults: {killed} killed the coordinator, {stopped} stopped it with an error")
    assert killed > 5
    assert stopped > 5


def injected(trace: Path, state: Path) -> tuple[str, int] | None:
    """The path whose call has failed, within the state, and how many calls came after it but those of closing.

    SQLite ends by moving the log into run.db, and synchronises the log once before.
    """
    lines = trace.read_text(errors="replace").splitlines()
    at = next((index for index, line in enumerate(lines) if "(INJECTED)" in line), None)
    if at is None:
        return None
    begun = next(line for line in reversed(lines[: at + 1]) if str(state.parent) in line)
    path = re.search(rf"{state.parent}(/[\w./-]*)?", begun)
    assert path is not None
    later = [line for line in lines[at + 1 :] if str(state) in line and f"{state}/run.db>" not in line]
    return path[0].removeprefix(str(state)), len(later)


@needs_strace
@pytest.mark.e2e
def test_an_update_is_acknowledged_after_it_is_on_disk(tmp_path: Path) -> None:
    state, trace = tmp_path / "state", tmp_path / "trace"
    calls = ",".join((*CALLS, "recvmsg", "sendmsg"))
    ended = run(state, *strace(trace, "-s", "8192", "-e", f"trace={calls}"))
    assert ended.done, ended.text

    lines = trace.read_text(errors="replace").splitlines()
    for header, _ in ended.acknowledged:
        came = next(i for i, line in enumerate(lines) if "recvmsg" in line and header.digest in line)
        thread = lines[came].split()[0]
        begun = next(line for line in reversed(lines[: came + 1]) if line.startswith(thread) and "recvmsg(" in line)
        connection = re.search(r"<TCP[^\]]*\][^\]]*\]", begun)
        assert connection is not None, begun

        def after(start: int, pattern: str) -> int:
            return next(i for i in range(start + 1, len(lines)) if re.search(pattern, lines[i]))

        at = came
        blob = f"{state}/blobs/{header.digest}"
        for step in (
            rf"write\(\d+<{blob}\.\d+\.tmp>",
            rf"fsync\(\d+<{blob}\.\d+\.tmp>",
            rf'rename\("{blob}\.\d+\.tmp", "{blob}"',
            rf"fsync\(\d+<{state}/blobs>",
            rf"pwrite64\(\d+<{state}/run\.db-wal>.*{header.digest}",
            rf"fdatasync\(\d+<{state}/run\.db-wal>",
        ):
            at = after(at, step)
        if "<unfinished" in lines[at]:  # another thread's call came between; this one has ended where it is resumed
            at = after(at, rf"^{lines[at].split()[0]} .*resumed>")
        # The reply's trailers; nothing else was asked on this connection.
        assert after(came, rf"sendmsg\(\d+{re.escape(connection[0])}.*grpc-(status|message)") > at


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 288 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=288k", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip(f"needs the right to mount a tmpfs: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.e2e
@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_a_full_disk_stops_the_coordinator_and_space_lets_it_go_on(small_disk: Path, expected: str) -> None:
    stopped = []
    for free in range(64, 192, 4) if PROVE else (80, 132, 168):
        state, ballast = small_disk / "state", small_disk / "ballast"
        ballast.write_bytes(bytes((288 - free) << 10))
        ended = run(state)
        if ended.code != 0:
            stopped.append(len(ended.acknowledged))
            assert re.search(rf"StoreError: {state}\S*: .*(full|No space|disk I/O)", ended.text), ended.text[-500:]
        ballast.unlink()

        assert finish(state, ended.acknowledged) == expected, f"{free} KiB free"
        shutil.rmtree(state)
    assert len(set(stopped)) > 1, f"the disk was full at one place only: {stopped}"
