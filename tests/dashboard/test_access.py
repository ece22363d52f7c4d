"""Who may see and do what on the dashboard."""

import json
import stat
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from fedloom.core.errors import ConfigError
from fedloom.server.monitoring.dashboard.access import ACTION, ALLOWED, TOKENS_FILE, Tokens, cookie, load_tokens
from fedloom.server.monitoring.dashboard.app import application
from fedloom.server.monitoring.dashboard.certificates import invited
from tests.dashboard.stage import TOKENS, Stage

ACT = {ACTION: "1"}
RANK = {"nobody": 0, "observer": 1, "operator": 2}
SHOWN = {"nobody": "", "observer": TOKENS.observer, "operator": TOKENS.operator}


@pytest.fixture
def stops(live: Stage, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Filled instead of stopping the server."""
    told: list[bool] = []
    monkeypatch.setattr(live.observation, "stop", lambda: told.append(True))
    return told


@pytest.fixture
def closed(live: Stage) -> TestClient:
    """The endpoints as they are served beyond loopback."""
    return TestClient(application(live.board, TOKENS, open_to_observers=False))


@pytest.fixture
def local(live: Stage) -> TestClient:
    """The endpoints as they are served on a loopback address."""
    app = application(live.board, TOKENS, open_to_observers=True)
    return TestClient(app, base_url="http://127.0.0.1:8480")


def _path(live: Stage, path: str) -> str:
    return path.replace("{run}", live.board.own).replace("{name}", "page.js")


@pytest.mark.parametrize("role", RANK)
@pytest.mark.parametrize(("method", "path"), ALLOWED)
@pytest.mark.parametrize("way", ["header", "cookie"])
def test_every_endpoint_opens_to_its_roles_and_no_other(
    live: Stage, closed: TestClient, stops: list[bool], method: str, path: str, role: str, way: str
) -> None:
    live.join("ann", "ben")
    live.rounds(1)
    assert live.board.certs is not None
    invited(live.board.certs, "ann", live.coordinator.audit)
    headers = dict(ACT)
    if way == "header":
        headers["authorization"] = f"Bearer {SHOWN[role]}"
    else:
        headers["cookie"] = f"{cookie(TOKENS)}={SHOWN[role]}"

    answer = closed.request(method, _path(live, path), headers=headers, json={"token": TOKENS.observer, "name": "ann"})

    enough = RANK[role] >= RANK[ALLOWED[method, path]]
    assert answer.status_code in ((200, 202, 204) if enough else (401,) if role == "nobody" else (403,))
    assert stops == ([True] if path == "/api/stop" and role == "operator" else [])


def test_on_loopback_everybody_may_look_and_only_the_operator_stops(
    live: Stage, local: TestClient, stops: list[bool]
) -> None:
    assert local.get("/api/runs").status_code == 200
    assert local.get("/api/session").json() == {"role": "observer", "open": True}
    assert local.post("/api/stop", headers=ACT).status_code == 403
    assert not stops

    assert local.post("/api/session", headers=ACT, json={"token": TOKENS.operator}).json() == {"role": "operator"}

    assert local.post("/api/stop", headers=ACT).status_code == 202
    assert stops == [True]
    live.coordinator.tick()
    assert [note.kind for note in live.store.audit()][-1] == "stopped"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8480", "127.0.0.1.evil.example", "", "localhost@evil"])
@pytest.mark.parametrize("path", ["/", "/api/runs", "/metrics", "/healthz"])
def test_a_name_that_is_not_this_machines_gets_nothing_on_loopback(local: TestClient, host: str, path: str) -> None:
    """What DNS rebinding would send: a page of another site whose name now leads here."""
    answer = local.get(path, headers={"host": host})

    assert answer.status_code == 421
    assert "ward-notes" not in answer.text


@pytest.mark.parametrize("host", ["localhost:8480", "127.0.0.1", "[::1]:8480", "LOCALHOST"])
def test_this_machines_names_are_served(local: TestClient, host: str) -> None:
    assert local.get("/api/runs", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(("method", "path"), [key for key in ALLOWED if key[0] != "GET"])
def test_nothing_is_done_without_a_header_that_no_form_can_send(
    live: Stage, closed: TestClient, stops: list[bool], method: str, path: str
) -> None:
    headers = {"cookie": f"{cookie(TOKENS)}={TOKENS.operator}"}

    answer = closed.request(method, _path(live, path), headers=headers, json={"token": TOKENS.operator})

    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers
    assert not stops


def test_the_cookie_is_for_the_server_alone(closed: TestClient, live: Stage) -> None:
    answer = closed.post("/api/session", headers=ACT, json={"token": TOKENS.operator})

    flags = {part.strip().lower() for part in answer.headers["set-cookie"].split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/"} <= flags
    assert "secure" not in flags
    encrypted = TestClient(application(live.board, TOKENS, open_to_observers=False, encrypted=True))
    answer = encrypted.post("/api/session", headers=ACT, json={"token": TOKENS.operator})
    assert "secure" in answer.headers["set-cookie"].lower()


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"token": 3}', b'{"token": ""}', b'{"token": "x"}', b"[" * 9000, b"\xff"]
)
def test_what_is_no_token_opens_nothing(closed: TestClient, body: bytes) -> None:
    answer = closed.post("/api/session", headers=ACT, content=body)

    assert answer.status_code == 403
    assert closed.get("/api/runs").status_code == 401


def test_a_cookie_or_header_of_rubbish_is_nobody(closed: TestClient) -> None:
    for headers in ({"cookie": "a b=;=;\x01"}, {"authorization": "Bearer \xff"}, {"authorization": "Basic eDp5"}):
        raw = [(key.encode(), value.encode("latin-1")) for key, value in headers.items()]
        assert closed.get("/api/runs", headers=raw).status_code == 401


def test_signing_out_takes_the_cookie_back(closed: TestClient) -> None:
    closed.post("/api/session", headers=ACT, json={"token": TOKENS.observer})
    assert closed.get("/api/runs").status_code == 200

    closed.delete("/api/session", headers=ACT)

    assert closed.get("/api/runs").status_code == 401


def test_every_answer_carries_the_headers_that_confine_the_page(closed: TestClient) -> None:
    for path in ("/", "/static/page.js", "/api/runs", "/nowhere", "/healthz"):
        headers = closed.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_tokens_are_made_once_and_for_their_owner_alone(tmp_path: Path) -> None:
    tokens, new = load_tokens(tmp_path / "certs")

    path = tmp_path / "certs" / TOKENS_FILE
    assert new
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_tokens(tmp_path / "certs") == (tokens, False)
    assert tokens.observer != tokens.operator
    assert min(len(tokens.observer), len(tokens.operator)) >= 43, "256 bits in base64"


@pytest.mark.parametrize(
    ("content", "mode", "match"),
    [
        (json.dumps({"observer": "a" * 40, "operator": "b" * 40}), 0o640, "can be read by other users"),
        ("{", 0o600, "delete it"),
        (json.dumps({"observer": "a" * 40, "operator": "a" * 40}), 0o600, "two different tokens"),
        (json.dumps({"observer": "a", "operator": "b" * 40}), 0o600, "two different tokens"),
    ],
)
def test_tokens_that_cannot_be_trusted_are_not_used(tmp_path: Path, content: str, mode: int, match: str) -> None:
    path = tmp_path / TOKENS_FILE
    path.write_text(content)
    path.chmod(mode)

    with pytest.raises(ConfigError, match=match):
        load_tokens(tmp_path)


def test_two_coordinators_of_a_machine_have_cookies_of_their_own() -> None:
    assert cookie(TOKENS) != cookie(Tokens("x" * 40, TOKENS.operator))
