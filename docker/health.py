"""Whether a coordinator answers: exit status 0 once a TLS connection to FEDLOOM_SERVER stands."""

import os
import socket
import ssl
import sys

__all__ = ["alive"]


def alive(address: str) -> bool:
    """Whether somebody at HOST:PORT speaks TLS 1.3. Who it is, members check by their certificates, not this."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        with socket.create_connection((host, int(port)), 5) as raw, context.wrap_socket(raw):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(not alive(os.environ["FEDLOOM_SERVER"]))
