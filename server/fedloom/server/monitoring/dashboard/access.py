"""Who may see and do what on the dashboard: two tokens, one table, and the headers that keep a browser honest."""

import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedloom.core.errors import ConfigError
from fedloom.core.runtime.durable import make_folder, write_durably

__all__ = [
    "ACTION",
    "ALLOWED",
    "LINKS_FILE",
    "TOKENS_FILE",
    "Access",
    "Role",
    "Tokens",
    "cookie",
    "load_tokens",
    "may",
    "write_links",
]

Role = Literal["nobody", "observer", "operator"]

TOKENS_FILE = "dashboard.json"
"""Name of the file with the two tokens; only its owner can read it."""

LINKS_FILE = "dashboard.links"
"""Name of the file with a link for each token; only its owner can read it."""

ACTION = "x-fedloom-action"
"""Header that everything but reading must carry. No form and no link of another page can set it."""

_RANK: dict[Role, int] = {"nobody": 0, "observer": 1, "operator": 2}

ALLOWED: dict[tuple[str, str], Role] = {
    ("GET", "/"): "nobody",
    ("GET", "/static/{name}"): "nobody",
    ("GET", "/healthz"): "nobody",
    ("GET", "/api/session"): "nobody",
    ("POST", "/api/session"): "nobody",
    ("DELETE", "/api/session"): "nobody",
    ("GET", "/api/runs"): "observer",
    ("GET", "/api/runs/{run}"): "observer",
    ("GET", "/api/runs/{run}/adapter"): "observer",
    ("GET", "/api/runs/{run}/rounds.csv"): "observer",
    ("GET", "/api/certificates"): "observer",
    ("GET", "/metrics"): "observer",
    ("POST", "/api/stop"): "operator",
    ("POST", "/api/finish"): "operator",
    ("POST", "/api/invite"): "operator",
    ("POST", "/api/revoke"): "operator",
}
"""The least role for each method and path. What is missing here is served to nobody."""

_LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Tokens:
    """Who shows one of them has its role."""

    observer: str
    operator: str

    def role(self, shown: str) -> Role:
        """The role of a token; every comparison takes the same time whatever is shown."""
        found: Role = "nobody"
        for role, token in (("observer", self.observer), ("operator", self.operator)):
            if hmac.compare_digest(shown.encode(), token.encode()):
                found = "observer" if role == "observer" else "operator"
        return found


def load_tokens(folder: Path) -> tuple[Tokens, bool]:
    """The tokens of a folder, and whether they were made just now.

    Raises:
        ConfigError: Their file can be read by others, is damaged, or cannot be read or written.
    """
    path = folder / TOKENS_FILE
    try:
        if not path.exists():
            make_folder(folder)
            tokens = Tokens(secrets.token_urlsafe(32), secrets.token_urlsafe(32))
            write_durably(path, json.dumps({"observer": tokens.observer, "operator": tokens.operator}).encode())
            return tokens, True
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} can be read by other users; chmod 600 it, or delete it to have new tokens made")
        document = json.loads(path.read_text(encoding="utf-8"))
        tokens = Tokens(str(document["observer"]), str(document["operator"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot use {path}: {error!r}; delete it to have new tokens made") from error
    if min(len(tokens.observer), len(tokens.operator)) < 32 or tokens.observer == tokens.operator:
        raise ConfigError(f"{path} does not hold two different tokens of 32 characters or more; delete it")
    return tokens, False


def write_links(folder: Path, url: str, tokens: Tokens) -> str:
    """Write a link for each token to a file: what a service prints ends up in a journal that many can read.

    Returns:
        The lines of the file.

    Raises:
        ConfigError: It cannot be written.
    """
    lines = f"to look:   {url}#token={tokens.observer}\nto run it: {url}#token={tokens.operator}\n"
    try:
        write_durably(folder / LINKS_FILE, lines.encode())
    except OSError as error:
        raise ConfigError(f"cannot write {folder / LINKS_FILE}: {error}; make its folder writable") from error
    return lines


def cookie(tokens: Tokens) -> str:
    """Name of the cookie. Cookies know no ports, so each coordinator of a machine has a name of its own."""
    return "fedloom-" + hashlib.sha256(tokens.observer.encode()).hexdigest()[:8]


class Access:
    """Middleware: who comes under a name that is not this machine's is sent away, and every caller gets its role.

    Args:
        app: What is served.
        tokens: The tokens.
        open_to_observers: On the loopback interface, who shows no token is an observer.

    The role is in the scope's state. A page elsewhere can make a browser ask loopback addresses under a name of its
    own (DNS rebinding); as such a page must not become an observer, the Host header is checked there.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens, *, open_to_observers: bool) -> None:
        self._app, self._tokens, self._open, self._cookie = app, tokens, open_to_observers, cookie(tokens)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        if self._open and _name(headers.get("host", "")) not in _LOCAL:
            refused = JSONResponse({"error": "ask for this page as localhost or 127.0.0.1"}, 421)
            await refused(scope, receive, with_headers)
            return
        scope.setdefault("state", {})["role"] = self._role(headers)
        if scope["method"] not in ("GET", "HEAD") and ACTION not in headers:
            await JSONResponse({"error": f"the header {ACTION} is missing"}, 403)(scope, receive, with_headers)
            return
        await self._app(scope, receive, with_headers)

    def _role(self, headers: Headers) -> Role:
        kind, _, shown = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            try:
                found = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
            except CookieError:
                found = None
            shown = found.value if found else ""
        least: Role = "observer" if self._open else "nobody"
        return max(self._tokens.role(shown.strip()), least, key=_RANK.__getitem__)


def may(role: Role, least: Role) -> bool:
    """Whether a role is enough."""
    return _RANK[role] >= _RANK[least]


def _name(host: str) -> str:
    """The host of a Host header, without the port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()
