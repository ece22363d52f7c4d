"""Enrolment, renewal, revocation and operation between the real client and the real server."""

import datetime as dt
import hashlib
import shutil
import socket
import sqlite3
import ssl
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from fedloom.client.channel import MEMBER_FILE
from fedloom.client.connection import GrpcConnection
from fedloom.client.enrolment import due, enrol, renew, renewing
from fedloom.proto.credentials import CA_FILE, KeyPair, Token, key_pem
from fedloom.proto.errors import ConfigError, IdentityError, Unavailable
from fedloom.proto.identity import Identity, MemberRole, fingerprint
from fedloom.proto.messages import Assignment
from fedloom.server import authority as authority_module
from fedloom.server.authority import SERVER_FILE, Authority, create
from fedloom.server.coordinator import Coordinator
from fedloom.server.serve import serving
from fedloom.simulation.credentials import enrolled

ANN = Identity(MemberRole.CLIENT, "ann")
Connect = Callable[[Path], GrpcConnection]
BothAsk = Callable[[GrpcConnection], Assignment]
ShortLived = Callable[[Path, float], Path]


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


@pytest.mark.parametrize("rogue", ["another authority", "a member's certificate", "another name"])
def test_a_coordinator_that_is_not_proven_is_not_talked_to(
    rogue: str, authority: Authority, made: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, folder = enrolled(authority, ANN, tmp_path / "ann"), tmp_path / "rogue"
    if rogue == "another authority":
        create(folder, [])
    else:
        shutil.copytree(authority.folder, folder)
    if rogue == "a member's certificate":
        shutil.copy(mine / MEMBER_FILE, folder / SERVER_FILE)
    if rogue == "another name":
        monkeypatch.setattr(authority_module, "_LOOPBACK", ())
        there = Authority(folder)
        there.renew_server(["fl.example.org"])
        there.close()

    with (
        serving(made, certs=folder, linger_s=0.0) as address,
        pytest.raises(Unavailable),
        closing(GrpcConnection(address, mine)) as connection,
    ):
        connection.join("ann", 0)


def test_a_server_without_whole_certificates_does_not_start(authority: Authority, made: Coordinator) -> None:
    (authority.folder / SERVER_FILE).unlink()

    with pytest.raises(IdentityError, match=r"server\.pem"), serving(made, certs=authority.folder):
        pytest.fail("it is served")
