"""Who was let in, put out or refused is in the audit log, which nobody can change without a trace."""

import threading
from contextlib import closing
from pathlib import Path

import pytest

from fedloom.client.transport import admin as operator
from fedloom.client.transport.enrollment import enrol, renew
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.client.transport.tls import open_channel
from fedloom.core.errors import Forbidden, IdentityError
from fedloom.core.security.subject import Identity, MemberRole
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.server.auth.ca import Authority
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.server import serving
from fedloom.server.storage.verify import look
from fedloom.simulation.credentials import enrolled


def test_who_came_and_went_and_was_refused_is_on_record(
    authority: Authority, made: Coordinator, tmp_path: Path
) -> None:
    token, mine = authority.invite(Identity(MemberRole.CLIENT, "ann"), 1.0), tmp_path / "ann"
    op = enrolled(authority, Identity(MemberRole.OPERATOR, "op"), tmp_path / "op")
    eye = enrolled(authority, Identity(MemberRole.OBSERVER, "eye"), tmp_path / "eye")
    with serving(made, certs=authority.folder) as address:
        enrol(token, address, mine)
        with pytest.raises(IdentityError):
            enrol(token, address, tmp_path / "thief")
        renew(address, mine)
        with closing(GrpcConnection(address, mine)) as connection, pytest.raises(Forbidden):
            connection.join("ben", 0)
        with pytest.raises(Forbidden):
            operator.stop(address, eye)
        with closing(GrpcConnection(address, mine)) as connection, open_channel(address, mine) as channel:
            joined = connection.join("ann", 0)
            request = pb.WorkRequest(run=joined.run, epoch=joined.epoch, client="ann")
            call = channel.unary_unary("/fedloom.v1.Federation/Work", pb.WorkRequest.SerializeToString, None)
            polling = call.future(request, timeout=30.0)
            threading.Timer(0.5, authority.identities.revoke, ["ann"]).start()
            assert polling.exception() is not None
        operator.stop(address, op)

    records = [(each.kind, each.client, each.detail) for each in look(tmp_path / "state").audit]

    def about(kind: str, name: str) -> list[str]:
        return [detail for *which, detail in records if which == [kind, name]]

    assert len(about("enrolled", "ann")) == len(about("renewed", "ann")) == 1
    stolen, other = about("refused", "ann")
    assert "has been used" in stolen
    assert "urn:fedloom:client:ann calls itself 'ben'" in other
    assert "may not call it" in about("refused", "eye")[0]
    assert "put out of a call" in about("revoked", "ann")[0]
    assert about("stopped", "op") == ["by urn:fedloom:operator:op"]
