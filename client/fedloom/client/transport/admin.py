"""The operator's side: how a coordinator's run stands, and stop."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedloom.client.transport.grpc import translated
from fedloom.client.transport.tls import open_channel
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.v1 import federation_pb2_grpc as rpc

__all__ = ["finish", "status", "stop"]

_CALL_S = 30.0


def status(address: str, certs: Path) -> pb.StatusReply:
    """How the run at HOST:PORT stands.

    Args:
        address: HOST:PORT of the coordinator.
        certs: Folder of certificates of an operator or an observer.

    Raises:
        ConfigError: The address is not HOST:PORT.
        IdentityError: The certificate cannot be read or is not accepted, or the coordinator does not prove itself;
            `Forbidden` if the role does not allow this.
        Unavailable: The coordinator cannot be reached.
    """
    with _stub(address, certs) as stub:
        return stub.Status(pb.StatusRequest(), timeout=_CALL_S)


def stop(address: str, certs: Path) -> None:
    """Stop the coordinator at HOST:PORT cleanly.

    Raises:
        FedloomError: As for `status`; observers are refused.
    """
    with _stub(address, certs) as stub:
        stub.Stop(pb.StopRequest(), timeout=_CALL_S)


def finish(address: str, certs: Path) -> None:
    """End the run at HOST:PORT with what is committed.

    Raises:
        FedloomError: As for `status`; observers are refused, and so is a run without a committed round.
    """
    with _stub(address, certs) as stub:
        stub.Finish(pb.FinishRequest(), timeout=_CALL_S)


@contextmanager
def _stub(address: str, certs: Path) -> "Iterator[rpc.OperationStub]":
    with open_channel(address, certs) as channel, translated(address):
        yield rpc.OperationStub(channel)
