"""Every method against every bad credential, over real sockets: nothing gets in, and nothing comes of it."""

import datetime as dt
import logging
import socket
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from fedloom.client.transport.tls import MEMBER_FILE, secure_channel
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ProtocolError
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.core.security.certificates import KeyPair, key_digest, new_key, signing_request
from fedloom.core.security.subject import Identity, MemberRole, fingerprint
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.server.auth.ca import AUTHORITY_FILE, SERVER_FILE, Authority, create
from fedloom.server.auth.gate import ALLOWED, Gate
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.server import serving
from fedloom.server.storage.local import Store
from fedloom.simulation.credentials import enrolled
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter

SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (2, 3)), TensorSpec("m.B", "m", Role.LORA_B, (3, 2))))
CONFIG = RunConfig.model_validate(
    {
        "run": {"name": "trial", "rounds": 1},
        "model": {"base": "tiny", "labels": ["no", "yes"]},
        "train": {"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1},
        "rounds": {"min_clients": 2},
    }
)
NAMES = {"ann": MemberRole.CLIENT, "op": MemberRole.OPERATOR, "eye": MemberRole.OBSERVER, "gone": MemberRole.CLIENT}
METHODS = [method for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods]
TLS = grpc.StatusCode.UNAVAILABLE
"""What a caller sees whom TLS itself turns away."""
UNKNOWN, FORBIDDEN = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
REFUSED = {TLS, UNKNOWN, FORBIDDEN}
TIMEOUT_S = 20.0


class World:
    """A served coordinator, and a channel by the name of each credential."""

    def __init__(self, folder: Path, coordinator: Coordinator, address: str, authority: Authority) -> None:
        self.coordinator, self.address, self.authority = coordinator, address, authority
        self.ca = KeyPair.read(folder / "certs" / AUTHORITY_FILE)
        self.pairs = {
            name: KeyPair.read(enrolled(authority, Identity(role, name), folder / name) / MEMBER_FILE)
            for name, role in NAMES.items()
        }
        authority.identities.revoke("gone")
        self.pairs["revoked"] = self.pairs["gone"]
        self.pairs["invite"] = authority.invite(Identity(MemberRole.CLIENT, "new"), 1.0).invite
        now, day = dt.datetime.now(dt.UTC), dt.timedelta(days=1)
        self.pairs["self-signed"] = forged(None, now - day, now + day)
        self.pairs["unlisted"] = forged(self.ca, now - day, now + day)
        self.pairs["misnamed"] = pair = forged(self.ca, now - day, now + day, "ben")
        token = authority.invite(Identity(MemberRole.CLIENT, "listed"), 1.0)
        holder = fingerprint(token.invite.certificate)
        authority.identities.enrol(holder, key_digest(pair.key.public_key()), lambda member: pair.certificate)
        self.pairs["expired"] = forged(self.ca, now - 2 * day, now - day)
        self.pairs["not-yet-valid"] = forged(self.ca, now + day, now + 2 * day)
        self.pairs["coordinators-own"] = KeyPair.read(folder / "certs" / SERVER_FILE)
        create(folder / "elsewhere", [])
        other = Authority(folder / "elsewhere")
        theirs = enrolled(other, Identity(MemberRole.CLIENT, "ann"), folder / "theirs")
        self.pairs["other-authority"] = KeyPair.read(theirs / MEMBER_FILE)
        other.close()
        self.channels = {name: secure_channel(address, self.ca.certificate, pair) for name, pair in self.pairs.items()}
        roots = grpc.ssl_channel_credentials(self.ca.certificate_pem)
        self.channels["no-certificate"] = grpc.secure_channel(address, roots)
        self.channels["plaintext"] = grpc.insecure_channel(address)

    def call(self, credential: str, name: str, client: str = "ann") -> grpc.StatusCode:
        """One call, and how it ended."""
        (method,) = [each for each in METHODS if each.name == name]
        path = f"/{method.containing_service.full_name}/{name}"
        # On the wire a call with one message is the same whatever the method's arity.
        start = self.channels[credential].stream_stream(path, request_serializer=None, response_deserializer=None)
        replies = start(iter([request(name, client).SerializeToString()]), timeout=TIMEOUT_S)
        try:
            for _ in replies:
                pass
        except grpc.RpcError:
            pass
        return replies.code()


def request(name: str, client: str) -> Message:
    (method,) = [each for each in METHODS if each.name == name]
    if name == "Enroll":
        return pb.EnrollRequest(signing_request=signing_request(new_key()))
    if name == "Submit":
        digest = "0" * 64
        header = pb.UpdateHeader(client=client, codec="fp32", digest=digest, schema_digest=digest)
        return pb.SubmitRequest(header=header)
    made = GetMessageClass(method.input_type)()
    if name == "Join":
        made = pb.JoinRequest(protocol=1)
    if "client" in method.input_type.fields_by_name:
        setattr(made, "client", client)  # noqa: B010
    return made


def forged(authority: KeyPair | None, start: dt.datetime, end: dt.datetime, name: str = "ann") -> KeyPair:
    """A certificate of a client, as the authority makes them, that is on no list."""
    key = new_key()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.certificate.subject if authority else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"urn:fedloom:client:{name}")]), critical=False
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=True)
        .sign(authority.key if authority else key, hashes.SHA256())
    )
    return KeyPair(key, certificate)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("auth")
    create(folder / "certs", [])
    authority = Authority(folder / "certs")
    with Store(folder / "state", durable=False) as store:
        made = Coordinator(CONFIG, SCHEMA, FedAvg(), store, starting=starting_adapter(SCHEMA, 0))
        with serving(made, certs=folder / "certs") as address:
            world = World(folder, made, address, authority)
            yield world
            for channel in world.channels.values():
                channel.close()
    authority.close()


BAD = {
    "no-certificate": TLS,
    "self-signed": TLS,
    "other-authority": TLS,
    "expired": TLS,
    "not-yet-valid": TLS,
    "coordinators-own": TLS,
    "plaintext": TLS,
    "unlisted": UNKNOWN,
    "revoked": UNKNOWN,
    "misnamed": UNKNOWN,
}
ROLES = {"ann": MemberRole.CLIENT, "op": MemberRole.OPERATOR, "eye": MemberRole.OBSERVER, "invite": MemberRole.INVITE}


def test_the_tables_know_every_method() -> None:
    assert set(ALLOWED) == {method.name for method in METHODS}
    assert len(METHODS) >= 10


@pytest.mark.parametrize("credential", BAD)
@pytest.mark.parametrize("method", sorted(ALLOWED))
def test_a_bad_credential_gets_nowhere(world: World, method: str, credential: str) -> None:
    before = world.authority.identities.entries()

    assert world.call(credential, method) is BAD[credential]

    assert world.authority.identities.entries() == before
    assert world.coordinator.progress.live == ()


@pytest.mark.parametrize("credential", ROLES)
@pytest.mark.parametrize("method", sorted(set(ALLOWED) - {"Stop", "Enroll"}))
def test_a_role_opens_its_own_methods_and_no_other(world: World, method: str, credential: str) -> None:
    code = world.call(credential, method)

    if ROLES[credential] in ALLOWED[method]:
        assert code not in REFUSED
    else:
        assert code is FORBIDDEN


@pytest.mark.parametrize("credential", sorted(set(ROLES) - {"op"}))
def test_only_an_operator_may_stop(world: World, credential: str) -> None:
    assert world.call(credential, "Stop") is FORBIDDEN


@pytest.mark.parametrize("method", ["Join", "Work", "Fetch", "Submit", "Exchange", "Heartbeat", "Leave"])
def test_a_member_speaks_for_nobody_else(world: World, method: str, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("ben", "", "ann\n", "ANN", "op"):
        assert world.call("ann", method, name) is FORBIDDEN

    assert "urn:fedloom:client:ann calls itself 'ben'" in caplog.text
    assert world.call("ann", method, "ann") not in REFUSED


def test_a_peer_learns_nothing_of_why(world: World) -> None:
    stub = world.channels["revoked"].unary_unary("/fedloom.v1.Operation/Status", None, None)

    with pytest.raises(grpc.RpcError) as caught:
        stub(b"", timeout=TIMEOUT_S)

    assert isinstance(caught.value, grpc.Call)
    assert caught.value.details() == "this certificate is not accepted; ask the operator for an invite and enrol again"


def http2_join(world: World, folder: Path, version: ssl.TLSVersion, client: str) -> bytes:
    """A Join by hand, over a TLS version that gRPC's own client does not offer by itself; what comes back."""
    path = folder / "pair.pem"
    world.pairs["ann"].write(path)
    context = ssl.create_default_context(cadata=world.ca.certificate_pem.decode())
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(path)
    context.set_alpn_protocols(["h2"])
    host, _, port = world.address.rpartition(":")
    headers = {
        ":method": "POST",
        ":scheme": "https",
        ":path": "/fedloom.v1.Federation/Join",
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    block = b"".join(
        bytes([0, len(key)]) + key.encode() + bytes([len(value)]) + value.encode() for key, value in headers.items()
    )
    message = pb.JoinRequest(client=client, protocol=1).SerializeToString()
    data = b"\0" + struct.pack(">I", len(message)) + message

    def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
        return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body

    with (
        socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as line,
    ):
        assert line.version() == {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}[version.name]
        line.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
        line.sendall(frame(1, 4, 1, block) + frame(0, 1, 1, data))
        received = b""
        while True:  # until the frame of headers that ends stream 1
            received += line.recv(65536)
            at = 0
            while at + 9 <= len(received):
                size = int.from_bytes(received[at : at + 3], "big")
                kind, flags, stream = (
                    received[at + 3],
                    received[at + 4],
                    int.from_bytes(received[at + 5 : at + 9], "big"),
                )
                at += 9 + size
                if (kind, flags & 1, stream) == (1, 1, 1) and at <= len(received):
                    return received


def test_tls_before_1_3_is_refused(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    http2_join(world, tmp_path, ssl.TLSVersion.TLSv1_2, "ann")
    assert "TLSv1.2" in caplog.text
    assert "not TLS 1.3" in caplog.text

    caplog.clear()
    answer = http2_join(world, tmp_path, ssl.TLSVersion.TLSv1_3, "ann")
    assert SCHEMA.digest.encode() in answer
    assert "refused" not in caplog.text


def test_a_handler_that_forgets_the_name_is_caught(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Gate, "check_name", lambda self, client: None)

    assert world.call("ann", "Join") is grpc.StatusCode.INTERNAL
    assert "without checking for whom it speaks" in caplog.text


def test_nothing_has_come_of_it(world: World) -> None:
    """After all of the above nobody has joined under a name that is not theirs."""
    joined = world.coordinator.join("zoe", 1, 0)
    for name in ("ben", "op", "eye", "gone", "new"):
        with pytest.raises(ProtocolError, match="not known"):
            world.coordinator.heartbeat(name, joined.run, joined.epoch)
