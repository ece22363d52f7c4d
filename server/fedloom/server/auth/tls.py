"""The coordinator's side of TLS: certificates on both ends, and new ones taken up without a restart."""

import datetime as dt
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import grpc
from cryptography.hazmat.primitives.serialization import Encoding

from fedloom.core.errors import IdentityError
from fedloom.core.security.certificates import CA_FILE, KeyPair, read_ca
from fedloom.server.auth.ca import SERVER_FILE

__all__ = ["server_credentials"]

_WARN = dt.timedelta(days=14)
_log = logging.getLogger(__name__)


def server_credentials(folder: Path) -> grpc.ServerCredentials:
    """Credentials from a folder of certificates, which is looked at again whenever somebody connects.

    Raises:
        IdentityError: The certificates cannot be read.
    """
    loader = _Loader(folder)
    first = loader.load()
    # The stubs do not know that None means "no change".
    fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", loader.fetch)
    return grpc.dynamic_ssl_server_credentials(first, fetch, require_client_authentication=True)


class _Loader:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: object = None

    def load(self) -> grpc.ServerCertificateConfiguration:
        """What the files say now.

        Raises:
            IdentityError: They cannot be read.
        """
        seen = self._state()
        pair, ca = KeyPair.read(self._folder / SERVER_FILE), read_ca(self._folder)
        ends = pair.certificate.not_valid_after_utc
        if ends - dt.datetime.now(dt.UTC) < _WARN:
            _log.warning("the coordinator's certificate ends on %s; run `fedloom certs renew`", ends.date())
        self._seen = seen
        return grpc.ssl_server_certificate_configuration(
            [(pair.key_pem, pair.certificate_pem)], root_certificates=ca.public_bytes(Encoding.PEM)
        )

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC calls for every new connection: new certificates, or None to go on with those in use."""
        if self._state() == self._seen:
            return None
        try:
            return self.load()
        except IdentityError as error:
            _log.error("new certificates are not taken up: %s", error)
            return None

    def _state(self) -> list[tuple[int, int] | None]:
        """What changes when a file is replaced."""
        found: list[tuple[int, int] | None] = []
        for name in (SERVER_FILE, CA_FILE):
            try:
                about = os.stat(self._folder / name)
                found.append((about.st_ino, about.st_mtime_ns))
            except OSError:
                found.append(None)
        return found
