"""The dashboard's endpoints. Handlers are plain functions, so each runs in a thread and may wait for the disk."""

import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from inspect import iscoroutinefunction
from pathlib import Path
from typing import IO, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from fedloom.core.errors import FedloomError, ProtocolError
from fedloom.server.monitoring.dashboard.access import ALLOWED, Access, Role, Tokens, cookie, may
from fedloom.server.monitoring.dashboard.adapter import RESULTS, folder_zip, state_zip
from fedloom.server.monitoring.dashboard.certificates import certificates, invited, revoked
from fedloom.server.monitoring.dashboard.runs import Board
from fedloom.server.storage.audit_log import Audit

__all__ = ["application"]

_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_BODY_BYTES = 4096
_CHUNK_BYTES = 1 << 20
_REMEMBERED_S = 7 * 24 * 3600
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def application(board: Board, tokens: Tokens, *, open_to_observers: bool, encrypted: bool = False) -> ASGIApp:
    """Everything the dashboard serves.

    Args:
        board: What is shown.
        tokens: Who shows one has its role.
        open_to_observers: Who shows none is an observer; for the loopback interface only.
        encrypted: It is served over TLS, so that the cookie may ask for that.
    """
    static = {path.name: path.read_bytes() for path in (files(__package__) / "static").iterdir()}
    site = _Site(board, tokens, open_to_observers, encrypted, static)
    routes = [
        Route(path, _guarded(partial(_HANDLERS[method, path], site), least), methods=[method])
        for (method, path), least in ALLOWED.items()
    ]
    return Access(Starlette(routes=routes), tokens, open_to_observers=open_to_observers)


@dataclass(frozen=True)
class _Site:
    board: Board
    tokens: Tokens
    open_to_observers: bool
    encrypted: bool
    static: dict[str, bytes]


def _page(site: _Site, request: Request) -> Response:
    return Response(site.static["index.html"], media_type="text/html")


def _asset(site: _Site, request: Request) -> Response:
    name = request.path_params["name"]
    if name not in site.static:
        return _missing("file")
    return Response(site.static[name], media_type=_KINDS[name.rpartition(".")[2]])


def _session(site: _Site, request: Request) -> Response:
    return JSONResponse({"role": request.state.role, "open": site.open_to_observers})


def _sign_out(site: _Site, request: Request) -> Response:
    answer = Response(status_code=204)
    answer.delete_cookie(cookie(site.tokens), httponly=True, samesite="strict", secure=site.encrypted)
    return answer


async def _sign_in(site: _Site, request: Request) -> Response:
    shown = await _said(request, "token")
    role = site.tokens.role(shown)
    if role == "nobody":
        return JSONResponse({"error": "this is not one of the two tokens"}, 403)
    answer = JSONResponse({"role": role})
    answer.set_cookie(
        cookie(site.tokens), shown, max_age=_REMEMBERED_S, httponly=True, samesite="strict", secure=site.encrypted
    )
    return answer


def _runs(site: _Site, request: Request) -> Response:
    return JSONResponse({"own": site.board.own, "runs": site.board.listing()})


def _run(site: _Site, request: Request) -> Response:
    found = site.board.run(request.path_params["run"])
    return _missing("run") if found is None else JSONResponse(found)


def _adapter(site: _Site, request: Request) -> Response:
    name = request.path_params["run"]
    shown, folder = site.board.run(name), site.board.run_folder(name)
    if shown is None or folder is None or shown["adapter"] is None:
        return _missing("adapter")
    try:
        kept = RESULTS.get(shown["adapter"])
        packed = folder_zip(folder / kept) if kept else state_zip(site.board.coordinator)
    except OSError:
        return _missing("adapter")
    headers = {"content-disposition": f'attachment; filename="{_file_name(name)}-{kept or "adapter"}.zip"'}
    return StreamingResponse(_chunks(packed), media_type="application/zip", headers=headers)


def _rounds(site: _Site, request: Request) -> Response:
    name = request.path_params["run"]
    found = site.board.rounds(name)
    if found is None:
        return _missing("run")
    headers = {"content-disposition": f'attachment; filename="{_file_name(name)}-rounds.csv"'}
    return Response(found, media_type="text/csv", headers=headers)


def _certificates(site: _Site, request: Request) -> Response:
    folder = site.board.certs
    return JSONResponse({"certificates": None if folder is None else certificates(folder)})


def _metrics(site: _Site, request: Request) -> Response:
    return Response(site.board.observation.metrics.text(), headers={"content-type": _PROMETHEUS})


def _healthz(site: _Site, request: Request) -> Response:
    problem = site.board.problem()
    return PlainTextResponse(f"{problem or 'ok'}\n", 503 if problem else 200)


def _stop(site: _Site, request: Request) -> Response:
    halt = site.board.observation.stop
    if halt is None:
        return JSONResponse({"error": "the run is not being served any more"}, 409)
    site.board.coordinator.audit.note("stopped", detail="by an operator, on the dashboard")
    halt()
    return JSONResponse({"stopping": True}, 202)


def _finish(site: _Site, request: Request) -> Response:
    if site.board.observation.stop is None:
        return JSONResponse({"error": "the run is not being served any more"}, 409)
    try:
        site.board.coordinator.finish()
    except ProtocolError as error:
        return JSONResponse({"error": str(error)}, 409)
    site.board.coordinator.audit.note("stopped", detail="run finished by an operator, on the dashboard")
    return JSONResponse({"finishing": True}, 202)


async def _invite(site: _Site, request: Request) -> Response:
    return await _about_member(site, request, invited)


async def _revoke(site: _Site, request: Request) -> Response:
    return await _about_member(site, request, revoked)


async def _about_member(site: _Site, request: Request, act: Callable[[Path, str, Audit], dict[str, Any]]) -> Response:
    """Do something about the client that the body names."""
    folder, name = site.board.certs, await _said(request, "name")
    if folder is None:
        return JSONResponse({"error": "this coordinator runs without certificates, see --certs"}, 409)
    try:
        return JSONResponse(await run_in_threadpool(act, folder, name, site.board.coordinator.audit))
    except FedloomError as error:
        return JSONResponse({"error": str(error)}, 409)


_HANDLERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("GET", "/"): _page,
    ("GET", "/static/{name}"): _asset,
    ("GET", "/healthz"): _healthz,
    ("GET", "/api/session"): _session,
    ("POST", "/api/session"): _sign_in,
    ("DELETE", "/api/session"): _sign_out,
    ("GET", "/api/runs"): _runs,
    ("GET", "/api/runs/{run}"): _run,
    ("GET", "/api/runs/{run}/adapter"): _adapter,
    ("GET", "/api/runs/{run}/rounds.csv"): _rounds,
    ("GET", "/api/certificates"): _certificates,
    ("GET", "/metrics"): _metrics,
    ("POST", "/api/stop"): _stop,
    ("POST", "/api/finish"): _finish,
    ("POST", "/api/invite"): _invite,
    ("POST", "/api/revoke"): _revoke,
}


def _guarded(handler: Callable[..., Any], least: Role) -> Callable[[Request], Awaitable[Response]]:
    """The handler for those whose role is enough."""

    async def checked(request: Request) -> Response:
        role: Role = request.state.role
        if not may(role, least):
            status = 401 if role == "nobody" else 403
            return JSONResponse({"error": f"this needs the {least}'s token"}, status)
        if iscoroutinefunction(handler):
            answer: Response = await handler(request)
        else:
            answer = await run_in_threadpool(handler, request)
        return answer

    return checked


async def _said(request: Request, key: str) -> str:
    """What the body of a request has under a key; empty if there is none."""
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > _BODY_BYTES:
                return ""
    except ClientDisconnect:  # it was too slow, or has left: nobody reads the answer
        return ""
    try:
        shown = json.loads(body)[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return shown if isinstance(shown, str) else ""


def _file_name(run: str) -> str:
    """A run's name with nothing in it that a header or a disk could take amiss."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "_" for letter in run)


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _missing(what: str) -> Response:
    return JSONResponse({"error": f"there is no such {what}"}, 404)
