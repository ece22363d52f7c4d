"""The proxies do what they are told, so that a test that passes through them has passed through something."""

import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest

from tests.faults import FaultProxy, fault_proxy


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        try:
            while data := self.request.recv(1 << 16):
                self.request.sendall(data)
        except OSError:
            return


@pytest.fixture
def echo() -> Iterator[str]:
    """Address of a server that sends back whatever comes."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def dial(proxy: FaultProxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def back(line: socket.socket, size: int) -> bytes:
    """What comes back, up to `size` bytes; less when the other end hangs up."""
    found = b""
    try:
        while len(found) < size and (piece := line.recv(size - len(found))):
            found += piece
    except ConnectionError:
        pass
    return found


def refused(proxy: FaultProxy) -> bool:
    """Whether a new connection is reset, be it before `connect` returns or after."""
    try:
        with dial(proxy) as line:
            return back(line, 1) == b""
    except ConnectionError:
        return True


def test_bytes_pass_in_slices_and_are_counted(echo: str) -> None:
    with fault_proxy(echo) as proxy, dial(proxy) as line:
        proxy.faults.slice_bytes, proxy.faults.latency_s = 3, 0.001
        line.sendall(b"0123456789")

        assert back(line, 10) == b"0123456789"
        assert (proxy.connections, proxy.up_bytes, proxy.down_bytes) == (1, 10, 10)


def test_one_bit_is_flipped_once(echo: str) -> None:
    with fault_proxy(echo) as proxy:
        proxy.faults.flips_up.append(4)
        for expected in (b"0123" + bytes([ord("4") ^ 1]) + b"56789", b"0123456789"):
            with dial(proxy) as line:
                line.sendall(b"0123456789")
                assert back(line, 10) == expected


@pytest.mark.parametrize("way", ["cuts_up", "cuts_down"])
def test_a_connection_is_cut_after_its_bytes(echo: str, way: str) -> None:
    with fault_proxy(echo) as proxy:
        proxy.faults.slice_bytes = 2
        getattr(proxy.faults, way).append(5)
        with dial(proxy) as line:
            line.sendall(b"0123456789")
            assert len(back(line, 10)) < 10
        with dial(proxy) as line:
            line.sendall(b"0123456789")
            assert back(line, 10) == b"0123456789"


def test_a_reset_ends_every_connection_and_refusing_every_new_one(echo: str) -> None:
    with fault_proxy(echo) as proxy, dial(proxy) as line:
        line.sendall(b"x")
        assert back(line, 1) == b"x"
        proxy.faults.refuse = True
        proxy.reset()

        assert back(line, 1) == b""
        assert refused(proxy)


@pytest.mark.parametrize("how", ["half open", "blackhole"])
def test_silence_is_silent(echo: str, how: str) -> None:
    with fault_proxy(echo) as proxy, dial(proxy) as line:
        line.sendall(b"x")
        assert back(line, 1) == b"x"
        if how == "half open":
            proxy.half_open()
        else:
            proxy.faults.blackhole = True
        line.sendall(b"y")
        line.settimeout(0.2)

        with pytest.raises(TimeoutError):
            line.recv(1)


def test_an_idle_connection_is_cut_by_a_connect_proxy_and_a_busy_one_is_not(echo: str) -> None:
    with fault_proxy() as proxy, dial(proxy) as line:
        line.sendall(f"CONNECT {echo} HTTP/1.1\r\nHost: {echo}\r\n\r\n".encode())
        granted = b"HTTP/1.1 200 Connection established\r\n\r\n"
        assert back(line, len(granted)) == granted
        proxy.faults.idle_s = 1.0
        for _ in range(15):
            line.sendall(b"x")
            assert back(line, 1) == b"x"
            threading.Event().wait(0.1)

        assert back(line, 1) == b""  # nothing is sent: it is hung up on
        assert proxy.targets == [echo]


def test_a_connect_proxy_carries_nothing_else(echo: str) -> None:
    with fault_proxy() as proxy, dial(proxy) as line:
        line.sendall(b"GET / HTTP/1.1\r\n\r\n")

        assert back(line, 12) in (b"HTTP/1.1 405", b"")
    assert proxy.targets == []
