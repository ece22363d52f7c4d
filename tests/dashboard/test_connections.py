"""Visitors who say nothing, or too slowly, over real sockets: others are answered all the same."""

import datetime as dt
import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedloom.server.monitoring.dashboard.connections import Limits
from fedloom.server.monitoring.dashboard.hosting import hosting
from tests.dashboard.stage import TOKENS, Stage

TIMEOUT_S = 60.0
SOON = 0.5
"""Seconds that a request may take where a test waits for the end of one that takes longer."""
HEAD = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    """A key and its own certificate for this machine."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "here")])
    now = dt.datetime.now(dt.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - dt.timedelta(1), now + dt.timedelta(1))
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = made.add_extension(here, critical=False).sign(key, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path / "here.pem"
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


class Visits:
    """Connections to one dashboard, all closed at the end."""

    def __init__(self, url: str, pem: Path | None) -> None:
        self.host, _, port = url.partition("//")[2].rstrip("/").rpartition(":")
        self.port = int(port)
        self.trust = None if pem is None else ssl.create_default_context(cafile=pem)
        self.open = ExitStack()

    def silent(self, source: str = "127.0.0.1") -> socket.socket:
        """A TCP connection, and no word on it."""
        line = socket.create_connection((self.host, self.port), TIMEOUT_S, (source, 0))
        return self.open.enter_context(line)

    def get(self, path: str) -> int:
        if self.trust is None:
            line = http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT_S)
        else:
            line = http.client.HTTPSConnection(self.host, self.port, timeout=TIMEOUT_S, context=self.trust)
        try:
            line.request("GET", path)
            answer = line.getresponse()
            answer.read()
            return answer.status
        finally:
            line.close()

    def answered(self) -> None:
        """What the coordinator's machine, its monitoring and its people ask for is there."""
        for path in ("/healthz", "/metrics", "/", "/api/runs"):
            assert self.get(path) == 200, path


@contextmanager
def visiting(live: Stage, limits: Limits | None = None, pem: Path | None = None) -> Iterator[Visits]:
    with hosting(live.board, "127.0.0.1:0", TOKENS, limits=limits, pem=pem) as hosted:
        visits = Visits(hosted.url, pem)
        with visits.open:
            yield visits


def ended(line: socket.socket) -> bool:
    """Waits until the other side has closed it."""
    with suppress(ConnectionError):
        while line.recv(1 << 16):
            pass
    return True


def trickling(line: socket.socket, first: bytes, rest: bytes) -> Callable[[], bool]:
    """One byte after the other, and never the whole; returns what waits until the other side has had enough."""
    line.sendall(first)
    over = threading.Event()

    def trickle() -> None:
        with suppress(OSError):
            for index in range(10**6):
                line.sendall(rest[index % len(rest) :][:1])
                if over.wait(SOON / 10):
                    return

    thread = threading.Thread(target=trickle, daemon=True)
    thread.start()

    def wait() -> bool:
        done = ended(line)
        over.set()
        thread.join(TIMEOUT_S)
        return done

    return wait


@pytest.mark.parametrize("encrypted", [False, True])
def test_silent_connections_shut_nobody_out(live: Stage, pem: Path, encrypted: bool) -> None:
    """More than may be open, from one address and from many, under the limits that everybody has."""
    with visiting(live, pem=pem if encrypted else None) as visits:
        for _ in range(100):
            visits.silent()
        visits.answered()
        for number in range(300):
            visits.silent(f"127.0.1.{number % 100}")
        visits.answered()


def test_slow_ones_shut_nobody_out(live: Stage) -> None:
    with visiting(live) as visits:
        for _ in range(100):
            visits.silent().sendall(HEAD + b"X: ")
        visits.answered()


def test_a_silent_connection_is_closed(live: Stage) -> None:
    with visiting(live, Limits(request_s=SOON)) as visits:
        assert ended(visits.silent())


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        (b"GET /healthz HTTP/1.1\r\n", b"X"),
        (HEAD + b"X: ", b"x"),
        (b"POST /api/session HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Fedloom-Action: 1\r\nContent-Length: 4000\r\n\r\n", b" "),
        (HEAD + b"Content-Length: 1000000\r\n\r\n", b"x"),
        (HEAD + b"\r\n", b"\r\n"),
    ],
    ids=["line", "header", "body", "body-nobody-reads", "between-requests"],
)
def test_a_request_that_comes_byte_by_byte_is_not_waited_for(
    live: Stage, caplog: pytest.LogCaptureFixture, first: bytes, rest: bytes
) -> None:
    with visiting(live, Limits(request_s=SOON)) as visits:
        assert trickling(visits.silent(), first, rest)()

    assert [each for each in caplog.records if each.levelname == "ERROR"] == []


def test_a_connection_is_kept_for_the_next_request(live: Stage) -> None:
    with visiting(live) as visits:
        line = http.client.HTTPConnection(visits.host, visits.port, timeout=TIMEOUT_S)
        for _ in range(20):
            line.request("GET", "/healthz")
            before = line.sock
            assert line.getresponse().read() == b"ok\n"
            assert line.sock is before
        line.close()


@pytest.mark.parametrize("words", [b"", b"\x16\x03\x01\x02\x00\x01\x00"])
def test_a_handshake_that_does_not_end_is_not_waited_for(live: Stage, pem: Path, words: bytes) -> None:
    with visiting(live, Limits(request_s=SOON), pem) as visits:
        lines = [visits.silent() for _ in range(40)]
        for line in lines:
            line.sendall(words)

        assert all(ended(line) for line in lines)


def test_who_does_not_read_its_answer_is_let_go(live: Stage) -> None:
    with visiting(live, Limits(stall_s=SOON)) as visits:
        line = visits.silent()
        line.sendall(2000 * b"GET /static/page.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        visits.answered()
        threading.Event().wait(3 * SOON)

        got = bytearray()
        with suppress(ConnectionError):
            while part := line.recv(1 << 20):
                got += part
        assert 0 < got.count(b"HTTP/1.1 200") < 2000


def test_who_is_being_answered_keeps_its_place(live: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def slow() -> list[str]:
        asked.set()
        go_on.wait(TIMEOUT_S)
        return []

    monkeypatch.setattr(live.board, "listing", slow)
    with visiting(live, Limits(per_address=2, in_all=3)) as visits:
        statuses: list[int] = []
        thread = threading.Thread(target=lambda: statuses.append(visits.get("/api/runs")))
        thread.start()
        assert asked.wait(TIMEOUT_S)
        silent = [visits.silent() for _ in range(10)]

        assert all(ended(line) for line in silent[:9])
        assert visits.get("/healthz") == 200
        go_on.set()
        thread.join(TIMEOUT_S)

    assert statuses == [200]


def test_when_everybody_is_being_answered_the_next_one_is_not(live: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go_on = threading.Semaphore(0), threading.Event()

    def slow() -> list[str]:
        asked.release()
        go_on.wait(TIMEOUT_S)
        return []

    monkeypatch.setattr(live.board, "listing", slow)
    with visiting(live, Limits(per_address=2)) as visits:
        threads = [threading.Thread(target=visits.get, args=("/api/runs",)) for _ in range(2)]
        for thread in threads:
            thread.start()
            assert asked.acquire(timeout=TIMEOUT_S)

        assert ended(visits.silent())
        line = visits.silent("127.0.0.2")
        line.sendall(HEAD + b"\r\n")
        assert line.recv(15) == b"HTTP/1.1 200 OK"
        go_on.set()
        for thread in threads:
            thread.join(TIMEOUT_S)
