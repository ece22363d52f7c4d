"""`fedloom doctor` on the way to a real coordinator: name, port, proxy, TLS, certificate, and what comes of asking."""

import datetime as dt
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.client.doctor import Finding
from fedloom.client.doctor.network import proxy_for
from fedloom.core.security.subject import Identity, MemberRole
from fedloom.server.auth import ca as authority_module
from fedloom.server.auth.ca import Authority, create
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.server import serving
from fedloom.simulation.credentials import enrolled
from tests.faults import fault_proxy

ANN = Identity(MemberRole.CLIENT, "ann")
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "client.toml"
    (tmp_path / "train.csv").write_text("text,label\nfine,yes\n")
    path.write_text('[client]\nname = "ann"\nstate = "home"\n[data]\nsource = "train.csv"\n')
    return path


@pytest.fixture
def site(authority: Authority, policy: Path) -> Path:
    """The folder of Ann's certificates."""
    (policy.parent / "home").mkdir()
    return enrolled(authority, ANN, policy.parent / "home" / "certs")


def examine(policy: Path, address: str, *words: str) -> dict[str, Finding]:
    done = CliRunner().invoke(app, ["doctor", str(policy), "--server", address, "--json", *words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    found = [Finding(**each) for each in json.loads(done.stdout)["findings"]]
    assert done.exit_code == (2 if any(each.level == "failed" for each in found) else 0)
    return {each.check: each for each in found}


def test_a_coordinator_that_answers_is_asked_and_not_joined(
    site: Path, policy: Path, address: str, made: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    joins: list[object] = []
    monkeypatch.setattr(Coordinator, "join", lambda _, *asked: joins.append(asked))
    before = made.state

    found = examine(policy, address)

    assert [found[each].level for each in ("reach", "tls", "coordinator", "certificate")] == ["ok"] * 4
    assert found["coordinator"].text == f"{address} answers and knows this site"
    assert found["certificate"].text == "client ann, 29 days left"
    assert made.state is before
    assert not joins


def test_nobody_at_the_address(site: Path, policy: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        found = examine(policy, f"127.0.0.1:{taken.getsockname()[1]}")

    assert found["reach"].level == "failed"
    assert "Connection refused" in found["reach"].text
    assert "firewall" in found["reach"].remedy
    assert "coordinator" not in found


def test_a_name_that_does_not_exist(site: Path, policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "Name or service not known" in examine(policy, "fl.invalid:8470")["reach"].text


def test_through_a_proxy(site: Path, policy: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with fault_proxy() as proxy:
        monkeypatch.setenv("https_proxy", f"http://{proxy.address}")

        found = examine(policy, address)

        assert [found[each].level for each in ("reach", "tls", "coordinator")] == ["ok"] * 3
        assert found["reach"].text == f"{address} accepts connections through the proxy {proxy.address}"
        assert proxy.targets == [address, address], "the doctor's own connection, and gRPC's"


@contextmanager
def answering(line: bytes) -> Iterator[str]:
    """A server that says one thing to everybody."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            try:
                while True:
                    with server.accept()[0] as peer:
                        peer.recv(1 << 16)
                        peer.sendall(line)
            except OSError:
                return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "have it allow CONNECT"),
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "put a user and password"),
        (b"", "have it allow CONNECT"),
    ],
)
def test_a_proxy_that_refuses(
    site: Path, policy: Path, line: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(line) as proxy:
        monkeypatch.setenv("https_proxy", f"http://{proxy}")
        found = examine(policy, "fl.example.org:8470")["reach"]

    assert found.level == "failed"
    assert found.text.startswith(f"the proxy {proxy} answers ")
    assert words in found.remedy


def test_a_proxy_that_is_not_there(site: Path, policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    assert examine(policy, "fl.example.org:8470")["reach"].remedy == "correct or unset https_proxy"


def test_the_proxy_is_the_one_that_grpc_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy_for("fl.example.org") is None
    monkeypatch.setenv("HTTPS_PROXY", "http://capitals:1")
    assert proxy_for("fl.example.org") is None
    monkeypatch.setenv("http_proxy", "http://last:1")
    monkeypatch.setenv("https_proxy", "http://middle:1")
    assert proxy_for("fl.example.org") == "http://middle:1"
    monkeypatch.setenv("no_proxy", "localhost, .example.org")
    assert proxy_for("fl.example.org") is None
    assert proxy_for("fl.example.net") == "http://middle:1"


UNTRUSTED = {
    "another authority": "is not from the authority in ca.pem",
    "another name": "does not name '127.0.0.1'",
    "ended": "has ended; run `fedloom certs renew` beside it",
}


@pytest.mark.parametrize("rogue", UNTRUSTED)
def test_a_certificate_that_is_not_to_be_trusted_is_told_apart(
    rogue: str, site: Path, policy: Path, authority: Authority, made: Coordinator, tmp_path: Path
) -> None:
    folder = tmp_path / "rogue"
    if rogue == "another authority":
        create(folder, [])
    else:
        shutil.copytree(authority.folder, folder)
    with pytest.MonkeyPatch.context() as patch, closing(Authority(folder)) as there:
        if rogue == "another name":
            patch.setattr(authority_module, "_LOOPBACK", ())
            there.renew_server(["fl.example.org"])
        if rogue == "ended":
            patch.setattr(authority_module, "_now", lambda: dt.datetime.now(dt.UTC) - dt.timedelta(days=200))
            there.renew_server()
    with serving(made, certs=folder, linger_s=0.0) as address:
        found = examine(policy, address)

    assert found["reach"].level == "ok"
    assert found["tls"].level == "failed"
    assert UNTRUSTED[rogue] in found["tls"].text
    assert "coordinator" not in found


def test_before_it_is_enrolled_a_site_is_told_to_enrol_and_nothing_of_tls(policy: Path, address: str) -> None:
    found = examine(policy, address)

    assert found["reach"].level == "ok"
    assert "fedloom certs enrol" in found["certificate"].remedy
    assert "tls" not in found
    assert found["coordinator"].level == "warning"
    assert "speaks TLS" in found["coordinator"].text


def test_no_tls_at_that_port(site: Path, policy: Path) -> None:
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        found = examine(policy, address)

    assert found["tls"].level == "failed"
    assert "must let this one through" in found["tls"].remedy


def test_a_revoked_site_is_told(site: Path, policy: Path, address: str, authority: Authority) -> None:
    authority.identities.revoke("ann")

    found = examine(policy, address)

    assert found["tls"].level == "ok"
    assert found["coordinator"].level == "failed"


def test_a_certificate_of_another_name_or_role(
    authority: Authority, policy: Path, address: str, tmp_path: Path
) -> None:
    assert "fedloom certs enrol" in examine(policy, address)["certificate"].remedy
    for number, other in enumerate((Identity(MemberRole.CLIENT, "ben"), Identity(MemberRole.OPERATOR, "ann"))):
        folder = enrolled(authority, other, tmp_path / str(number))
        found = examine(policy, address, "--certs", str(folder))
        assert found["certificate"].text.startswith(f"it is for the {other.role} {other.name}, ")
        assert found["coordinator"].level == "failed"


def test_a_certificate_that_ends_soon_or_has_ended(
    short_lived: Callable[[Path, float], Path], policy: Path, tmp_path: Path, address: str
) -> None:
    soon, ended = short_lived(tmp_path / "soon", 3600.0), short_lived(tmp_path / "ended", -1.0)

    found = examine(policy, address, "--certs", str(soon))["certificate"]
    assert found.level == "warning"
    assert "0 days left: less than a third" in found.text
    found = examine(policy, address, "--certs", str(ended))["certificate"]
    assert found.level == "failed"
    assert "ended on" in found.text
    assert "first see that the clock is right" in found.remedy


def test_a_clock_before_the_certificates_is_told(
    authority: Authority, policy: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(authority_module, "_now", lambda: dt.datetime.now(dt.UTC) + dt.timedelta(days=3))
        folder = enrolled(authority, ANN, tmp_path / "later")

    found = examine(policy, address, "--certs", str(folder))["clock"]

    assert found.level == "failed"
    assert "before this site's certificate was made" in found.text
