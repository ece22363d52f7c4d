"""The way to the coordinator: through the proxy if there is one, then TLS, then its answer to a question."""

import datetime as dt
import os
import socket
import ssl
from base64 import b64encode
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cryptography import x509

from fedloom.client.doctor.finding import Finding, failed, ok, warning
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.client.transport.tls import MEMBER_FILE
from fedloom.core.errors import FedloomError, Forbidden, IdentityError, Overloaded, Unavailable
from fedloom.core.security.address import host_of

__all__ = ["answer", "proxy_for", "reach", "server_certificate"]

_CONNECT_S = 10.0
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_DIRECT = ("no_grpc_proxy", "no_proxy")


def proxy_for(host: str) -> str | None:
    """The proxy that gRPC takes to this host, by the environment; names in capitals are not read, as gRPC does not."""
    exceptions = next((os.environ[name] for name in _DIRECT if os.environ.get(name)), "")
    if any(host.endswith(each.strip().removeprefix("*")) for each in exceptions.split(",") if each.strip()):
        return None
    return next((os.environ[name] for name in _PROXIES if os.environ.get(name)), None)


def reach(address: str) -> tuple[Finding, socket.socket | None]:
    """A connection to the coordinator's port, and how it was made."""
    host, port = host_of(address), int(address.rpartition(":")[2])
    proxy = proxy_for(host)
    if proxy is None:
        try:
            return ok("reach", f"{address} accepts connections"), socket.create_connection((host, port), _CONNECT_S)
        except OSError as error:
            hint = (
                "look whether the coordinator runs, whether name and port are right, and whether a firewall is between"
            )
            return failed(
                "reach", f"no connection to {address}: {error}", f"{hint}; behind a proxy, set https_proxy"
            ), None
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    shown = f"{parts.hostname}:{parts.port or 80}"
    try:
        line = socket.create_connection((parts.hostname or "", parts.port or 80), _CONNECT_S)
    except OSError as error:
        return failed("reach", f"no connection to the proxy {shown}: {error}", "correct or unset https_proxy"), None
    try:
        status = _tunnel(line, address, unquote(f"{parts.username}:{parts.password}") if parts.username else "")
    except OSError as error:
        status = f"nothing ({error})"
    if status.split(" ")[1:2] != ["200"]:
        line.close()
        remedy = (
            "have it allow CONNECT to that host and port, or name the host in no_proxy"
            if " 407" not in status
            else "put a user and password that it knows into https_proxy, as http://USER:PASSWORD@HOST:PORT"
        )
        return failed("reach", f"the proxy {shown} answers {status!r} to CONNECT {address}", remedy), None
    return ok("reach", f"{address} accepts connections through the proxy {shown}"), line


def _tunnel(line: socket.socket, address: str, login: str) -> str:
    """The first line of the proxy's answer."""
    head = f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n"
    if login:
        head += f"Proxy-Authorization: Basic {b64encode(login.encode()).decode()}\r\n"
    line.sendall(f"{head}\r\n".encode())
    answer = b""
    while b"\r\n\r\n" not in answer and len(answer) < 1 << 16:
        part = line.recv(4096)
        if not part:
            break
        answer += part
    return answer.partition(b"\r\n")[0].decode("latin-1")


def server_certificate(line: socket.socket, host: str, certs: Path) -> tuple[Finding | None, x509.Certificate | None]:
    """The certificate shown at the other end, unverified: `answer` says whether it is to be trusted."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        # Before enrolment there is none, and the coordinator shows its own all the same.
        if (certs / MEMBER_FILE).exists():
            context.load_cert_chain(certs / MEMBER_FILE)
        with context.wrap_socket(line, server_hostname=host) as wrapped:
            shown = wrapped.getpeercert(binary_form=True)
    except (OSError, ssl.SSLError) as error:
        return failed(
            "tls",
            f"no TLS at the coordinator's address: {error}",
            "give the port of `fedloom server`; a proxy that opens TLS connections must let this one through as it is",
        ), None
    return None, None if shown is None else x509.load_der_x509_certificate(shown)


def answer(address: str, client: str, certs: Path | None, shown: x509.Certificate | None) -> list[Finding]:
    """TLS, and the coordinator's answer to a client that has not joined; asking changes nothing there."""
    secure = [] if shown is None else [ok("tls", f"its certificate is trusted until {_day(shown)}")]
    try:
        with closing(GrpcConnection(address, certs)) as line:
            line.ping(client)
    except Forbidden as error:
        return [*secure, failed("coordinator", str(error), "enrol with a join token for a client of that name")]
    except IdentityError as error:
        check = "tls" if "the certificate of coordinator" in str(error) else "coordinator"
        rest = secure if check == "coordinator" else []
        return [*rest, failed(check, str(error), "" if check == "tls" else "enrol again with a new join token")]
    except Overloaded as error:
        return [*secure, warning("coordinator", str(error), "come back later")]
    except Unavailable as error:
        # TLS 1.3 says no more than this when it is this site's certificate that is refused.
        return [
            failed("coordinator", str(error), "look at the coordinator's log, and whether this certificate is revoked")
        ]
    except FedloomError as error:
        return [*secure, failed("coordinator", str(error))]
    return [*secure, ok("coordinator", f"{address} answers and knows this site")]


def _day(certificate: x509.Certificate) -> str:
    ends: dt.datetime = certificate.not_valid_after_utc
    return f"{ends:%Y-%m-%d}"
