"""The authority and its list of certificates: what it makes, for whom, how often, and who may read it."""

import datetime as dt
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedloom.core.errors import ConfigError, IdentityError, StoreError
from fedloom.core.security.certificates import KeyPair, Token, new_key, read_ca, signing_request
from fedloom.core.security.subject import Identity, MemberRole, fingerprint, identity_of
from fedloom.server.auth.ca import AUTHORITY_FILE, CLIENT_DAYS, SERVER_FILE, Authority, create
from fedloom.server.auth.certificates import MAX_VALID, Identities

ANN = Identity(MemberRole.CLIENT, "ann")


@pytest.fixture
def authority(tmp_path: Path) -> Iterator[Authority]:
    create(tmp_path / "certs", ["fl.example.org", "10.1.2.3"])
    made = Authority(tmp_path / "certs")
    yield made
    made.close()


def holder(token: Token) -> str:
    return fingerprint(token.invite.certificate)


def enrol(authority: Authority, identity: Identity = ANN) -> x509.Certificate:
    return authority.enrol(holder(authority.invite(identity, 1.0)), signing_request(new_key()))


def states(authority: Authority, now_s: float = 0.0) -> list[str]:
    return [entry.state(now_s) for entry in authority.identities.entries()]


def test_nobody_else_can_read_what_is_secret(authority: Authority) -> None:
    enrol(authority)

    assert stat.S_IMODE(authority.folder.stat().st_mode) == 0o700
    names = {path.name for path in authority.folder.iterdir()}
    assert {"ca.pem", AUTHORITY_FILE, SERVER_FILE, "identities.db"} <= names
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in authority.folder.iterdir())


def test_the_coordinators_certificate_is_good_for_its_names_and_for_nothing_else(authority: Authority) -> None:
    certificate = KeyPair.read(authority.folder / SERVER_FILE).certificate
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value

    assert set(names.get_values_for_type(x509.DNSName)) == {"localhost", "fl.example.org"}
    assert {str(each) for each in names.get_values_for_type(x509.IPAddress)} == {"127.0.0.1", "::1", "10.1.2.3"}
    _check_leaf(certificate, ExtendedKeyUsageOID.SERVER_AUTH)
    certificate.verify_directly_issued_by(read_ca(authority.folder))
    # Members check it by clocks that may be a day off.
    assert dt.datetime.now(dt.UTC) - certificate.not_valid_before_utc > dt.timedelta(days=1)


def test_a_members_certificate_names_it_and_is_short(authority: Authority) -> None:
    certificate = enrol(authority)

    assert identity_of(certificate) == ANN
    _check_leaf(certificate, ExtendedKeyUsageOID.CLIENT_AUTH)
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert life <= dt.timedelta(days=CLIENT_DAYS)


def _check_leaf(certificate: x509.Certificate, purpose: x509.ObjectIdentifier) -> None:
    find = certificate.extensions.get_extension_for_class
    assert list(find(x509.ExtendedKeyUsage).value) == [purpose]
    assert not find(x509.BasicConstraints).value.ca
    assert not find(x509.KeyUsage).value.key_cert_sign


@pytest.mark.parametrize("host", ["", "a b", "*.example.org", "https://x", "x:8470", "a..b", "ü.example"])
def test_a_host_that_is_none_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="neither an IP address nor a DNS name"):
        create(tmp_path / "certs", [host])

    assert not (tmp_path / "certs").exists()


def test_an_authority_is_not_made_over_another(authority: Authority) -> None:
    before = (authority.folder / AUTHORITY_FILE).read_bytes()

    with pytest.raises(ConfigError, match="has an authority already"):
        create(authority.folder, [])

    assert (authority.folder / AUTHORITY_FILE).read_bytes() == before


@pytest.mark.parametrize("name", ["", "a b", "a:b", "../a", "-a", "a" * 65, "ä", "a\n"])
def test_a_name_that_is_none_is_not_invited(authority: Authority, name: str) -> None:
    with pytest.raises(ConfigError, match="1 to 64 letters"):
        authority.invite(Identity(MemberRole.CLIENT, name), 1.0)


@pytest.mark.parametrize("hours", [0.0, -1.0, 24 * CLIENT_DAYS + 1, float("nan")])
def test_an_invite_is_not_for_ever(authority: Authority, hours: float) -> None:
    with pytest.raises(ConfigError, match="hours"):
        authority.invite(ANN, hours)


def test_an_invite_is_good_for_one_key_however_often_it_asks(authority: Authority) -> None:
    token, request = authority.invite(ANN, 1.0), signing_request(new_key())

    first = authority.enrol(holder(token), request)

    assert authority.enrol(holder(token), request) == first
    with pytest.raises(IdentityError, match="has been used"):
        authority.enrol(holder(token), signing_request(new_key()))
    assert states(authority) == ["used", "valid"]


def test_an_invite_that_was_used_stays_used_after_a_restart(authority: Authority) -> None:
    token = authority.invite(ANN, 1.0)
    authority.enrol(holder(token), signing_request(new_key()))
    authority.close()

    again = Authority(authority.folder)
    with pytest.raises(IdentityError, match="has been used"):
        again.enrol(holder(token), signing_request(new_key()))
    again.close()


def test_a_member_that_is_invited_again_is_replaced(authority: Authority) -> None:
    lost, unused, token = enrol(authority), authority.invite(ANN, 1.0), authority.invite(ANN, 1.0)

    new = authority.enrol(holder(token), signing_request(new_key()))

    for name in (fingerprint(lost), holder(unused)):
        with pytest.raises(IdentityError):
            authority.enrol(name, signing_request(new_key()))
    assert authority.enrol(fingerprint(new), signing_request(new_key()))


def test_a_revoked_member_can_neither_renew_nor_use_its_invites(authority: Authority) -> None:
    mine, unused = enrol(authority), authority.invite(ANN, 1.0)
    other = enrol(authority, Identity(MemberRole.CLIENT, "ben"))

    assert authority.identities.revoke("ann") == 3

    for name in (fingerprint(mine), holder(unused)):
        with pytest.raises(IdentityError, match="cannot be used to enrol"):
            authority.enrol(name, signing_request(new_key()))
    assert authority.enrol(fingerprint(other), signing_request(new_key()))
    with pytest.raises(ConfigError, match="nobody named 'eve'"):
        authority.identities.revoke("eve")


def test_a_certificate_that_has_ended_cannot_enrol(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    token = authority.invite(ANN, 1.0)
    end_s = token.invite.certificate.not_valid_after_utc.timestamp()
    monkeypatch.setattr(time, "time", lambda: end_s)

    with pytest.raises(IdentityError, match="cannot be used"):
        authority.enrol(holder(token), signing_request(new_key()))


def test_who_is_not_on_the_list_cannot_enrol(authority: Authority) -> None:
    with pytest.raises(IdentityError, match="cannot be used"):
        authority.enrol("0" * 64, signing_request(new_key()))


def test_renewals_come_to_an_end(authority: Authority) -> None:
    mine = fingerprint(enrol(authority))
    request = signing_request(new_key())
    for _ in range(3):
        authority.enrol(mine, request)  # the same key, the same certificate
    assert states(authority).count("valid") == 2

    for _ in range(MAX_VALID - 2):
        authority.enrol(mine, signing_request(new_key()))
    with pytest.raises(IdentityError, match=f"{MAX_VALID} certificates of this name"):
        authority.enrol(mine, signing_request(new_key()))


def test_a_name_has_one_role(authority: Authority) -> None:
    enrol(authority)

    with pytest.raises(ConfigError, match="ann is known as client"):
        authority.invite(Identity(MemberRole.OPERATOR, "ann"), 1.0)
    authority.identities.revoke("ann")
    authority.invite(Identity(MemberRole.OPERATOR, "ann"), 1.0)


def _csr(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def _flipped(request: bytes) -> bytes:
    return request[:-1] + bytes([request[-1] ^ 1])


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"\0" * 100,
        bytes(5000),
        _csr(ec.generate_private_key(ec.SECP384R1())),
        _csr(rsa.generate_private_key(65537, 2048)),
        signing_request(new_key())[:-10],
        _flipped(signing_request(new_key())),
    ],
    ids=["empty", "zeros", "long", "other-curve", "rsa", "cut", "not-its-key"],
)
def test_a_request_that_is_none_is_refused_and_leaves_the_invite(authority: Authority, request_: bytes) -> None:
    token = authority.invite(ANN, 1.0)

    with pytest.raises(IdentityError, match="PKCS #10"):
        authority.enrol(holder(token), request_)

    assert states(authority) == ["invited"]


def test_the_names_in_a_request_are_ignored(authority: Authority) -> None:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ben")])
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("urn:fedloom:operator:ben")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name).add_extension(names, critical=False)
    request = builder.sign(new_key(), hashes.SHA256()).public_bytes(Encoding.DER)

    assert identity_of(authority.enrol(holder(authority.invite(ANN, 1.0)), request)) == ANN


def test_a_renewed_coordinator_keeps_its_names_and_has_a_new_key(authority: Authority) -> None:
    before = KeyPair.read(authority.folder / SERVER_FILE)

    authority.renew_server()
    after = KeyPair.read(authority.folder / SERVER_FILE)
    authority.renew_server(["other.example.org"])
    renamed = KeyPair.read(authority.folder / SERVER_FILE).certificate

    def names(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value

    assert names(after.certificate) == names(before.certificate)
    assert after.key.private_numbers() != before.key.private_numbers()
    assert names(renamed).get_values_for_type(x509.DNSName) == ["localhost", "other.example.org"]


def test_an_authority_whose_files_do_not_fit_is_not_opened(authority: Authority, tmp_path: Path) -> None:
    create(tmp_path / "other", [])
    (authority.folder / "ca.pem").write_bytes((tmp_path / "other" / "ca.pem").read_bytes())

    with pytest.raises(IdentityError, match="is not the certificate in"):
        Authority(authority.folder)


def test_an_authority_that_others_can_read_is_not_opened(authority: Authority) -> None:
    os.chmod(authority.folder / AUTHORITY_FILE, 0o644)

    with pytest.raises(IdentityError, match="chmod 600"):
        Authority(authority.folder)


def test_a_list_that_is_damaged_lets_nobody_in(authority: Authority) -> None:
    token = authority.invite(ANN, 1.0)
    authority.close()
    for path in authority.folder.glob("identities.db*"):
        path.write_bytes(b"not a database, however long it is " * 1000)

    with pytest.raises(StoreError, match=r"identities\.db"):
        Identities(authority.folder).find(holder(token))


def test_the_list_holds_no_private_key(authority: Authority) -> None:
    token = authority.invite(ANN, 1.0)
    enrol(authority)
    secret = token.invite.key.private_numbers().private_value.to_bytes(32, "big")

    with sqlite3.connect(authority.folder / "identities.db") as db:
        rows = db.execute("SELECT * FROM certificates").fetchall()
    db.close()

    assert len(rows) == 3
    assert not any(secret in cell for row in rows for cell in row if isinstance(cell, bytes))
    assert secret.hex() not in str(rows)
