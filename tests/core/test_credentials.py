"""Keys, certificates and join tokens as files and text."""

import datetime as dt
import os
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import ConfigError, IdentityError
from fedloom.core.security.certificates import KeyPair, Token, key_pem, load_key, new_key, read_ca
from fedloom.core.security.subject import Identity, MemberRole, identity_of
from fedloom.server.auth.ca import SERVER_FILE, Authority, create

ANN = Identity(MemberRole.CLIENT, "ann")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("certs")
    create(made, [])
    return made


@pytest.fixture(scope="module")
def token(folder: Path) -> Token:
    authority = Authority(folder)
    try:
        return authority.invite(ANN, 1.0)
    finally:
        authority.close()


def test_a_token_is_one_line_that_gives_itself_back(folder: Path, token: Token) -> None:
    text = token.to_text()
    back = Token.from_text(f"  {text}\n")

    assert text.split() == [text]
    assert text.startswith("fedloom-join-1.")
    assert back.ca == read_ca(folder)
    assert identity_of(back.invite.certificate) == Identity(MemberRole.INVITE, "ann")
    assert key_pem(back.invite.key) == key_pem(token.invite.key)


def test_a_token_with_one_digit_changed_or_missing_is_refused(token: Token) -> None:
    text = token.to_text()
    for at in range(0, len(text), 37):
        for spoilt in (text[:at] + text[at + 1 :], text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]):
            with pytest.raises(ConfigError, match="not a whole join token") as caught:
                Token.from_text(spoilt)
            assert text[20:40] not in str(caught.value)
            assert caught.value.__cause__ is None


@given(st.text(max_size=80))
def test_any_other_text_is_no_token(text: str) -> None:
    for each in (text, f"fedloom-join-1.{text}"):
        with pytest.raises(ConfigError, match="not a whole join token"):
            Token.from_text(each)


def test_a_pair_shows_no_key(folder: Path, token: Token) -> None:
    pair = KeyPair.read(folder / SERVER_FILE)

    assert "PRIVATE" not in repr(pair)
    assert str(pair.key.private_numbers().private_value) not in repr(pair)
    assert token.to_text()[20:40] not in repr(token)


def test_a_pair_that_does_not_belong_together_is_refused(folder: Path, tmp_path: Path) -> None:
    pair = KeyPair.read(folder / SERVER_FILE)
    with pytest.raises(IdentityError, match="another key"):
        KeyPair(new_key(), pair.certificate)

    path = tmp_path / "pair.pem"
    path.write_bytes(key_pem(new_key()) + pair.certificate_pem)
    path.chmod(0o600)
    with pytest.raises(IdentityError, match="damaged"):
        KeyPair.read(path)


@pytest.mark.parametrize("keep", [0, 10, 200, 400, -40])
def test_a_pair_cut_short_is_refused(folder: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "pair.pem"
    path.write_bytes((folder / SERVER_FILE).read_bytes()[:keep])
    path.chmod(0o600)

    with pytest.raises(IdentityError, match="damaged"):
        KeyPair.read(path)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_key_that_others_can_reach_is_not_used(folder: Path, tmp_path: Path, mode: int) -> None:
    path = tmp_path / "pair.pem"
    path.write_bytes((folder / SERVER_FILE).read_bytes())
    os.chmod(path, mode)

    with pytest.raises(IdentityError, match="chmod 600"):
        KeyPair.read(path)


def test_a_missing_pair_or_authority_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="fedloom certs enrol"):
        KeyPair.read(tmp_path / "member.pem")
    with pytest.raises(IdentityError, match="fedloom certs init"):
        read_ca(tmp_path)


def test_only_keys_on_the_one_curve_are_loaded() -> None:
    with pytest.raises(ValueError, match="P-256"):
        load_key(key_pem(ec.generate_private_key(ec.SECP384R1())))


@pytest.mark.parametrize(
    "names",
    [
        [],
        [x509.UniformResourceIdentifier("urn:other:client:ann")],
        [x509.UniformResourceIdentifier("urn:fedloom:king:ann")],
        [x509.UniformResourceIdentifier("urn:fedloom:client:a b")],
        [
            x509.UniformResourceIdentifier("urn:fedloom:client:ann"),
            x509.UniformResourceIdentifier("urn:fedloom:client:b"),
        ],
        [x509.DNSName("ann")],
    ],
)
def test_a_certificate_without_exactly_one_name_of_ours_names_nobody(names: list[x509.GeneralName]) -> None:
    key, now = new_key(), dt.datetime.now(dt.UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ann")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)

    with pytest.raises(IdentityError):
        identity_of(builder.sign(key, hashes.SHA256()))
