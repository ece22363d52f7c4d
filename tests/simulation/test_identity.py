"""Enrolment, renewal, revocation and operation between the real client and the real server."""

import datetime as dt
import hashlib
import os
import re
import shutil
import socket
import sqlite3
import ssl
import subprocess
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest

from fedloom.client.transport.admin import status
from fedloom.client.transport.enrollment import due, enrol, renew, renewing
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.client.transport.tls import MEMBER_FILE
from fedloom.core.errors import ConfigError, IdentityError, Unavailable
from fedloom.core.security.certificates import CA_FILE, KeyPair, Token, key_pem
from fedloom.core.security.subject import Identity, MemberRole, fingerprint
from fedloom.proto.messages import Assignment
from fedloom.server.auth import ca as authority_module
from fedloom.server.auth.ca import SERVER_FILE, Authority, create
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.server import serving
from fedloom.simulation.credentials import enrolled
from tests.faults import fault_proxy
from tests.support import preloaded

ANN = Identity(MemberRole.CLIENT, "ann")
Connect = Callable[[Path], GrpcConnection]
BothAsk = Callable[[GrpcConnection], Assignment]
ShortLived = Callable[[Path, float], Path]
Impose = Callable[[str], AbstractContextManager[str]]


def test_a_token_lets_in_once_and_the_key_stays_here(
    authority: Authority, address: str, tmp_path: Path, connect: Connect
) -> None:
    token = Token.from_text(authority.invite(ANN, 1.0).to_text())
    mine = tmp_path / "ann" / "certs"

    assert enrol(token, address, mine) == ANN

    assert {path.name for path in mine.iterdir()} == {CA_FILE, MEMBER_FILE}
    assert mine.stat().st_mode & 0o777 == 0o700
    assert (mine / MEMBER_FILE).stat().st_mode & 0o777 == 0o600
    assert key_pem(KeyPair.read(mine / MEMBER_FILE).key) != token.invite.key_pem
    assert connect(mine).join("ann", 0).spec.run.name == "trial"
    with pytest.raises(IdentityError, match="has been used"):
        enrol(token, address, tmp_path / "thief")
    assert not (tmp_path / "thief" / MEMBER_FILE).exists()


def test_an_enrolment_cut_off_goes_on_with_the_same_key(
    authority: Authority, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, mine = authority.invite(ANN, 1.0), tmp_path / "ann"

    def cut(pair: KeyPair, path: Path) -> None:
        raise ConfigError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(KeyPair, "write", cut)
        with pytest.raises(ConfigError, match="power cut"):
            enrol(token, address, mine)

    assert enrol(token, address, mine) == ANN
    assert [each.state(0) for each in authority.identities.entries()] == ["used", "valid"]


def test_enrolling_over_a_certificate_is_refused(authority: Authority, address: str, tmp_path: Path) -> None:
    mine = enrolled(authority, ANN, tmp_path / "ann")

    with pytest.raises(ConfigError, match="has a certificate already"):
        enrol(authority.invite(ANN, 1.0), address, mine)


def test_a_renewed_certificate_is_taken_up_between_two_calls(
    authority: Authority, both_ask: BothAsk, address: str, tmp_path: Path, connect: Connect
) -> None:
    mine = enrolled(authority, ANN, tmp_path / "ann")
    before, connection = KeyPair.read(mine / MEMBER_FILE), connect(mine)
    both_ask(connection)

    assert renew(address, mine) == ANN

    assert key_pem(KeyPair.read(mine / MEMBER_FILE).key) != key_pem(before.key)
    # The old one is revoked by hand, so that the next call can only come from the new one.
    with closing(sqlite3.connect(authority.folder / "identities.db")) as db, db:
        query = "UPDATE certificates SET revoked_s = 1 WHERE fingerprint = ?"
        assert db.execute(query, (fingerprint(before.certificate),)).rowcount == 1
    assert isinstance(connection.work(), Assignment)


def test_a_running_client_renews_when_a_third_of_the_life_is_left(
    authority: Authority, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = enrolled(authority, ANN, tmp_path / "ann")
    before = (mine / MEMBER_FILE).read_bytes()
    end = KeyPair.read(mine / MEMBER_FILE).certificate.not_valid_after_utc

    class Later(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> "Later":
            at = end - dt.timedelta(days=9, hours=23)
            return cls.fromtimestamp(at.timestamp(), tz)

    with renewing(address, mine):
        assert not due(mine)
    assert (mine / MEMBER_FILE).read_bytes() == before
    monkeypatch.setattr(dt, "datetime", Later)
    assert due(mine)
    with renewing(address, mine):
        pass
    assert (mine / MEMBER_FILE).read_bytes() != before


def test_a_certificate_that_has_ended_says_so_at_once(short_lived: ShortLived, tmp_path: Path) -> None:
    mine = short_lived(tmp_path / "ann", -1.0)

    with pytest.raises(IdentityError, match=r"ended on .* enrol again"):
        GrpcConnection("127.0.0.1:1", mine)


def served_certificate(address: str, certs: Path, mine: Path) -> str:
    """Fingerprint of what a coordinator shows on a new connection."""
    context = ssl.create_default_context(cafile=certs / CA_FILE)
    context.load_cert_chain(mine / MEMBER_FILE)
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as raw, context.wrap_socket(raw, server_hostname=host) as line:
        return hashlib.sha256(line.getpeercert(binary_form=True) or b"").hexdigest()


def test_a_new_server_certificate_is_taken_up_while_serving(
    authority: Authority, address: str, tmp_path: Path, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    mine = enrolled(authority, ANN, tmp_path / "ann")
    connection, folder = connect(mine), authority.folder
    connection.join("ann", 0)
    first = served_certificate(address, folder, mine)

    authority.renew_server()

    renewed = fingerprint(KeyPair.read(folder / SERVER_FILE).certificate)
    assert served_certificate(address, folder, mine) == renewed != first
    connection.join("ann", 0)  # on the line that was open before
    (folder / SERVER_FILE).write_text("half a fi")
    assert served_certificate(address, folder, mine) == renewed
    assert "new certificates are not taken up" in caplog.text


UNTRUSTED = {
    "another authority": r"is not from the authority in ca\.pem .* enrol into another folder with a token from this",
    "a member's certificate": "is a member's and not a coordinator's",
    "another name": r"does not name '127\.0\.0\.1'; .* `fedloom certs renew --host 127\.0\.0\.1` beside it",
    "ended": "has ended; run `fedloom certs renew` beside it",
    "not begun": "has not begun; set the clocks",
}


@pytest.fixture
def impose(authority: Authority, made: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Impose:
    """Serve with a certificate that members of the authority must not trust."""

    def serve(rogue: str) -> AbstractContextManager[str]:
        folder = tmp_path / "rogue"
        if rogue == "another authority":
            create(folder, [])
        else:
            shutil.copytree(authority.folder, folder)
        if rogue == "a member's certificate":
            member = enrolled(authority, Identity(MemberRole.CLIENT, "eve"), tmp_path / "eve")
            shutil.copy(member / MEMBER_FILE, folder / SERVER_FILE)
        with monkeypatch.context() as patch, closing(Authority(folder)) as there:
            if rogue == "another name":
                patch.setattr(authority_module, "_LOOPBACK", ())
                there.renew_server(["fl.example.org"])
            if rogue in ("ended", "not begun"):
                days = -200 if rogue == "ended" else 200
                patch.setattr(authority_module, "_now", lambda: dt.datetime.now(dt.UTC) + dt.timedelta(days=days))
                there.renew_server()
        return serving(made, certs=folder, linger_s=0.0)

    return serve


@pytest.mark.parametrize("rogue", UNTRUSTED)
def test_a_coordinator_that_is_not_proven_is_not_talked_to(
    rogue: str, authority: Authority, impose: Impose, tmp_path: Path
) -> None:
    mine = enrolled(authority, ANN, tmp_path / "ann")
    text = f"^the certificate of coordinator {{}} {UNTRUSTED[rogue]}"

    with impose(rogue) as address, closing(GrpcConnection(address, mine)) as connection:
        with pytest.raises(IdentityError, match=text.format(address)):
            connection.join("ann", 0)
        with pytest.raises(IdentityError, match=text.format(address)):
            status(address, mine)
        with pytest.raises(IdentityError, match=text.format(address)):
            renew(address, mine)
        token = authority.invite(Identity(MemberRole.CLIENT, "ben"), 1.0)
        with pytest.raises(IdentityError, match=text.format(address)):
            enrol(token, address, tmp_path / "ben")


@pytest.mark.e2e
@pytest.mark.parametrize("rogue", ["another authority", "another name"])
def test_a_client_ends_at_once_with_one_line_on_what_to_do(
    rogue: str, authority: Authority, impose: Impose, tmp_path: Path
) -> None:
    enrolled(authority, ANN, tmp_path / "state" / "certs")
    policy = tmp_path / "policy.toml"
    # Of rows that only a run without privacy explains, nothing is read before the coordinator is known.
    site = f'client = {{ name = "ann", state = "{tmp_path}/state" }}\ndata = {{ source = "none.csv" }}\n'
    policy.write_text(site + "privacy = { allow_non_private = true }\n")
    environment = {key: value for key, value in os.environ.items() if key != "GRPC_VERBOSITY"}

    with impose(rogue) as address:
        command = [*preloaded.command(), "client", "--server", address, "--policy", str(policy)]
        # Its patience is longer than this.
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=environment)

    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(f"error: the certificate of coordinator {address} {UNTRUSTED[rogue]}", line)


LASTING = ["reset", "gone", "no TLS", "own certificate refused"]


@pytest.mark.parametrize("fault", LASTING)
def test_what_may_pass_by_itself_is_no_matter_of_trust(
    fault: str, authority: Authority, made: Coordinator, tmp_path: Path
) -> None:
    mine = enrolled(authority, ANN, tmp_path / "ann")
    if fault == "own certificate refused":
        create(tmp_path / "other", [])
        with closing(Authority(tmp_path / "other")) as other:
            theirs = enrolled(other, ANN, tmp_path / "theirs")
        shutil.copy(theirs / MEMBER_FILE, mine / MEMBER_FILE)
    certs = None if fault == "no TLS" else authority.folder
    with socket.create_server(("127.0.0.1", 0)) as closed:
        gone = "127.0.0.1:{1}".format(*closed.getsockname())

    with serving(made, certs=certs, linger_s=0.0) as address, fault_proxy(address) as proxy:
        proxy.faults.refuse = fault == "reset"
        with closing(GrpcConnection(gone if fault == "gone" else proxy.address, mine)) as connection:
            for _ in range(2):
                with pytest.raises(Unavailable):
                    connection.join("ann", 0)


def test_a_proxy_that_cuts_in_the_handshake_is_called_again(authority: Authority, address: str, tmp_path: Path) -> None:
    mine, refused = enrolled(authority, ANN, tmp_path / "ann"), 0
    with fault_proxy(address) as proxy:
        proxy.faults.slice_bytes = 50
        proxy.faults.cuts_down = deque([1, 100, 300, 600, 900])
        with closing(GrpcConnection(proxy.address, mine)) as connection:
            while True:
                try:
                    joined = connection.join("ann", 0)
                    break
                except Unavailable:
                    refused += 1
                    time.sleep(0.05)

        assert joined.spec.run.name == "trial"
        assert refused
        assert proxy.connections == 6


def test_a_server_without_whole_certificates_does_not_start(authority: Authority, made: Coordinator) -> None:
    (authority.folder / SERVER_FILE).unlink()

    with pytest.raises(IdentityError, match=r"server\.pem"), serving(made, certs=authority.folder):
        pytest.fail("it is served")
