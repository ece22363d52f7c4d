"""The socket between a site's processes: who may connect, what is read, and who starts whom."""

import os
import socket
import stat
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from fedloom.client.policy import Policy
from fedloom.core.errors import ConfigError, ProtocolError, Unavailable
from fedloom.flower.messages import Reply, Request, from_head
from fedloom.flower.resident_process import run, serve
from fedloom.flower.unix_socket import ask, listening, receive, send, socket_path
from fedloom.proto.message_codec import to_json
from tests.flower.conftest import BROADCAST, Site


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path is short enough for a socket."""
    with TemporaryDirectory(prefix="fl") as folder:
        yield Path(folder)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, two = socket.socketpair()
    with closing(one), closing(two):
        yield one, two


NOBODY = [sys.executable, "-c", "raise SystemExit(3)"]


def test_only_the_owner_may_connect(short: Path) -> None:
    path = short / "node.sock"
    before = os.umask(0)
    try:
        with closing(listening(path)):
            mode = stat.S_IMODE(path.stat().st_mode)
        assert os.umask(0) == 0, "the process's own mask is as it was"
    finally:
        os.umask(before)

    assert mode == 0o600


def test_a_message_comes_as_it_was_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    payload = os.urandom(3 << 20)
    sender = threading.Thread(target=send, args=(pair[0], b"{}", payload))
    sender.start()

    assert receive(pair[1]) == (b"{}", payload)
    sender.join()


@pytest.mark.parametrize(
    "prefix", [(b"GET / HT", 2, 0), (b"fedloom1", 1 << 30, 0), (b"fedloom1", 2, 1 << 62)], ids=["magic", "head", "size"]
)
def test_a_message_that_is_too_long_or_none_is_refused_unread(
    pair: tuple[socket.socket, socket.socket], prefix: tuple[bytes, int, int]
) -> None:
    pair[0].sendall(struct.pack(">8sIQ", *prefix))

    with pytest.raises(ProtocolError, match="are allowed"):
        receive(pair[1])


def test_a_sender_that_is_gone_is_an_error(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendall(struct.pack(">8sIQ", b"fedloom1", 2, 9) + b"{}")
    pair[0].shutdown(socket.SHUT_WR)

    with pytest.raises(Unavailable, match="9 bytes before"):
        receive(pair[1])


def test_a_path_that_no_socket_can_have_is_refused_with_what_to_do(policy: Policy) -> None:
    deep = policy.client.model_copy(update={"state": Path("/" + "x" * 120)})

    with pytest.raises(ConfigError, match=r"client\.state"):
        socket_path(policy.model_copy(update={"client": deep}))


def test_a_trainer_that_does_not_start_is_an_error_that_names_its_log(short: Path) -> None:
    with pytest.raises(Unavailable, match=r"node\.log says why"):
        ask(short / "node.sock", NOBODY, b"", b"")
    with pytest.raises(Unavailable, match="node-config"):
        ask(short / "node.sock", [str(short / "missing")], b"", b"")


@pytest.fixture
def served(site: Site, short: Path) -> Iterator[Path]:
    """A resident trainer that answers until the test is over."""
    path, over = short / "node.sock", threading.Event()
    resident = site.start()
    with closing(listening(path)) as server:
        thread = threading.Thread(target=serve, args=(server, resident, 600.0, over.is_set))
        thread.start()
        yield path
        over.set()
        thread.join()
    resident.close()


def test_the_same_bytes_go_to_whoever_asks_again(served: Path, site: Site, work: Callable[[int], Request]) -> None:
    head = to_json(work(0))

    first, second = (ask(served, NOBODY, head, BROADCAST) for _ in range(2))

    assert first == second
    assert site.trainers[0].calls.count("train 0") == 1


def test_one_who_leaves_in_the_middle_keeps_nobody_else_from_an_answer(
    served: Path, site: Site, work: Callable[[int], Request]
) -> None:
    head = to_json(work(0))
    for sent in (b"", b"nonsense" * 4, struct.pack(">8sIQ", b"fedloom1", len(head), len(BROADCAST)) + head + BROADCAST):
        with closing(socket.socket(socket.AF_UNIX)) as line:
            line.connect(str(served))
            line.sendall(sent)

    answer, update = ask(served, NOBODY, head, BROADCAST)

    assert from_head(Reply, answer).header is not None
    assert update
    assert site.trainers[0].calls.count("train 0") == 1, "what was made for the one who left is kept"


def test_a_request_that_is_none_is_refused(served: Path) -> None:
    head, payload = ask(served, NOBODY, b"{}", b"")

    assert (from_head(Reply, head).refusal, payload) == ("refused", b"")


def test_a_trainer_ends_with_its_parent_or_when_idle_and_leaves_no_socket(policy: Policy, short: Path) -> None:
    here = policy.model_copy(update={"client": policy.client.model_copy(update={"state": short})})
    child = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitpid(child, 0)

    assert run(here, 600.0, child)
    assert run(here, 0.01, os.getpid())
    assert not (short / "flower" / "node.sock").exists()


def test_a_second_trainer_of_a_site_is_not_needed(policy: Policy, short: Path) -> None:
    import fcntl

    here = policy.model_copy(update={"client": policy.client.model_copy(update={"state": short})})
    (short / "flower").mkdir()
    with (short / "flower" / "node.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        assert not run(here, 0.01, None)
    assert not (short / "flower" / "node.sock").exists()
