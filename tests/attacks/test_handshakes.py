"""The coordinator's own port under connections that never finish their handshake: members are served all the same."""

import socket
import ssl
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from fedloom.client.transport.grpc import GrpcConnection
from fedloom.client.transport.tls import MEMBER_FILE
from fedloom.core.config.run import RunConfig
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.core.security.certificates import CA_FILE
from fedloom.core.security.subject import Identity, MemberRole
from fedloom.server.auth.ca import Authority, create
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc import server as serve_module
from fedloom.server.rpc.server import serving
from fedloom.server.storage.local import Store
from fedloom.simulation.credentials import enrolled
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter

TIMEOUT_S = 60.0
SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (2, 3)), TensorSpec("m.B", "m", Role.LORA_B, (3, 2))))
CONFIG = RunConfig.model_validate(
    {
        "run": {"name": "trial", "rounds": 1},
        "model": {"base": "tiny", "labels": ["no", "yes"]},
        "train": {"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1},
    }
)
HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


def silent(line: socket.socket, member: Path) -> socket.socket:
    return line


def half_a_hello(line: socket.socket, member: Path) -> socket.socket:
    line.sendall(HELLO)
    return line


def silent_inside(line: socket.socket, member: Path) -> socket.socket:
    """A member that is through with TLS and does not begin with HTTP/2."""
    context = ssl.create_default_context(cafile=member / CA_FILE)
    context.load_cert_chain(member / MEMBER_FILE)
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(line)


@pytest.mark.parametrize(("visit", "count"), [(silent, 300), (half_a_hello, 300), (silent_inside, 30)])
def test_handshakes_that_do_not_end_shut_no_member_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    visit: Callable[[socket.socket, Path], socket.socket],
    count: int,
) -> None:
    brief = [(key, 1_000 if "handshake" in key else value) for key, value in serve_module.OPTIONS]
    monkeypatch.setattr(serve_module, "OPTIONS", tuple(brief))
    certs = tmp_path / "certs"
    create(certs, [])
    authority = Authority(certs)
    member = enrolled(authority, Identity(MemberRole.CLIENT, "ann"), tmp_path / "ann")
    authority.close()
    with Store(tmp_path / "state", durable=False) as store, ExitStack() as stack:
        made = Coordinator(CONFIG, SCHEMA, FedAvg(), store, starting=starting_adapter(SCHEMA, 0))
        address = stack.enter_context(serving(made, certs=certs, linger_s=0.0))
        host, _, port = address.rpartition(":")
        lines = [
            stack.enter_context(visit(socket.create_connection((host, int(port)), TIMEOUT_S), member))
            for _ in range(count)
        ]

        ann = GrpcConnection(address, member)
        stack.callback(ann.close)
        assert ann.join("ann", 1).run

        for line in lines:
            with suppress(ConnectionError, ssl.SSLError):
                while line.recv(1 << 16):  # the server's greeting, then the end
                    pass
