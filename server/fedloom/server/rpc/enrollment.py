"""The gRPC face of the authority: members get their certificates here. It translates, and decides nothing."""

import asyncio
from typing import Any, NoReturn

from cryptography.hazmat.primitives.serialization import Encoding
from grpc import aio

from fedloom.core.errors import IdentityError
from fedloom.core.security.subject import MemberRole, fingerprint
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.v1 import federation_pb2_grpc as pb_grpc
from fedloom.server.auth.ca import Authority
from fedloom.server.auth.gate import Gate
from fedloom.server.rpc.servicer import guarded
from fedloom.server.storage.audit_log import AuditKind

__all__ = ["Enrolment"]


class Enrolment(pb_grpc.EnrolmentServicer):
    """Carries signing requests to an authority.

    Args:
        authority: What is served.
        gate: Lets calls in.
        failed: Gets the error when the authority cannot write its list any more.
    """

    def __init__(self, authority: Authority, gate: Gate, failed: "asyncio.Future[NoReturn]") -> None:
        self.gate, self.failed = gate, failed
        self._authority = authority

    @guarded
    async def Enroll(self, request: pb.EnrollRequest, context: "aio.ServicerContext[Any, Any]") -> pb.EnrollReply:
        """See federation.proto."""
        caller = self.gate.caller()
        assert caller.identity is not None  # nobody enrols without a certificate
        try:
            made = await asyncio.to_thread(self._authority.enrol, caller.fingerprint, request.signing_request)
        except IdentityError as error:  # a join token that is used again has been stolen, or was lent
            self.gate.note("refused", caller.identity.name, str(error))
            raise
        kind: AuditKind = "enrolled" if caller.identity.role is MemberRole.INVITE else "renewed"
        self.gate.note(kind, caller.identity.name, f"certificate {fingerprint(made)[:16]}")
        return pb.EnrollReply(certificate=made.public_bytes(Encoding.DER))
