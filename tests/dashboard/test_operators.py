"""What operators do on the dashboard, and nobody else."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fedloom.core.security.certificates import Token
from fedloom.proto.messages import Finished
from fedloom.server.monitoring.dashboard.access import ACTION, ALLOWED, cookie
from fedloom.server.monitoring.dashboard.app import application
from fedloom.server.monitoring.dashboard.certificates import certificates, invited
from fedloom.server.monitoring.dashboard.csv_table import HEADS
from tests.dashboard.stage import TOKENS, Stage, finished_run, stage

ACT = {ACTION: "1"}
DOES = [path for (method, path), _ in ALLOWED.items() if method == "POST" and path != "/api/session"]


def site(live: Stage, token: str = "") -> TestClient:
    made = TestClient(application(live.board, TOKENS, open_to_observers=True), base_url="http://127.0.0.1:8480")
    if token:
        made.headers["authorization"] = f"Bearer {token}"
    return made


def listed(live: Stage) -> list[tuple[str, str, str]]:
    assert live.board.certs is not None
    return [(each["name"], each["role"], each["state"]) for each in certificates(live.board.certs)]


def standing(live: Stage) -> tuple[Any, ...]:
    """All that an action could change."""
    return listed(live), live.coordinator.finished, live.observation.stop, len(live.store.events())


def test_there_are_four_things_that_change_something() -> None:
    assert DOES == ["/api/stop", "/api/finish", "/api/invite", "/api/revoke"]
    assert {ALLOWED["POST", path] for path in DOES} == {"operator"}


@pytest.mark.parametrize("path", DOES)
@pytest.mark.parametrize("token", ["", TOKENS.observer])
def test_who_may_look_changes_nothing(live: Stage, path: str, token: str) -> None:
    live.join("ann", "ben")
    live.rounds(1)
    assert live.board.certs is not None
    invited(live.board.certs, "ann", live.coordinator.audit)
    before = standing(live)

    answer = site(live, token).post(path, headers=ACT, json={"name": "ann"})

    assert answer.status_code == 403
    assert standing(live) == before


@pytest.mark.parametrize("path", DOES)
def test_a_page_elsewhere_cannot_act_by_an_operators_browser(live: Stage, path: str) -> None:
    """What a form of another site can send: the cookie, if the browser gave it away, and no header of ours."""
    live.join("ann", "ben")
    live.rounds(1)
    before = standing(live)
    headers = {"cookie": f"{cookie(TOKENS)}={TOKENS.operator}", "origin": "https://evil.example"}

    answer = site(live).post(path, headers=headers, data={"name": "ann"})

    assert answer.status_code == 403
    assert standing(live) == before
    cross = site(live).options(path, headers={"origin": "https://evil.example"} | ACT)
    assert "access-control-allow-origin" not in cross.headers, "and no browser may send it for another site"


def test_an_operator_ends_a_run_with_what_is_committed(tmp_path: Path) -> None:
    with stage(tmp_path / "runs", expect=2) as live:
        live.join("ann", "ben")
        early = site(live, TOKENS.operator).post("/api/finish", headers=ACT)
        live.rounds(2)

        answer = site(live, TOKENS.operator).post("/api/finish", headers=ACT)

        assert (early.status_code, answer.status_code) == (409, 202)
        assert "no round is committed yet" in early.json()["error"]
        live.clients[0].ask()
        ended = live.clients[0].assignment
        assert isinstance(ended, Finished)
        assert ended.rounds == 2
        live.coordinator.tick()
        last = live.store.audit()[-1]
        assert (last.kind, last.detail) == ("stopped", "run finished by an operator, on the dashboard")


def test_an_operator_invites_a_client_and_revokes_it(live: Stage) -> None:
    operator = site(live, TOKENS.operator)

    made = operator.post("/api/invite", headers=ACT, json={"name": "hospital-a"})
    Token.from_text(made.json()["token"])  # a whole one
    seen = site(live).get("/api/certificates").json()["certificates"]
    gone = operator.post("/api/revoke", headers=ACT, json={"name": "hospital-a"})

    assert (made.status_code, made.json()["hours"]) == (200, 24.0)
    assert [(each["name"], each["role"], each["state"]) for each in seen] == [
        ("", "coordinator", "valid"),
        ("hospital-a", "client", "invited"),
    ]
    assert all(each["ends"] > "2026" for each in seen)
    assert made.json()["token"] not in str(seen)
    assert gone.json() == {"name": "hospital-a", "revoked": 1}
    assert listed(live) == [("", "coordinator", "valid")]
    live.coordinator.tick()
    assert [(each.kind, each.client) for each in live.store.audit()][-2:] == [
        ("invited", "hospital-a"),
        ("revoked", "hospital-a"),
    ]
    assert made.json()["token"] not in str(live.store.audit())


@pytest.mark.parametrize(
    ("path", "name", "words"),
    [
        ("/api/invite", "two words", "1 to 64 letters"),
        ("/api/invite", "", "1 to 64 letters"),
        ("/api/revoke", "nobody", "nobody named 'nobody' was ever invited"),
        ("/api/revoke", "boss", "boss is no client; revoke it on the coordinator's machine"),
    ],
)
def test_a_wrong_name_is_one_line(live: Stage, path: str, name: str, words: str) -> None:
    from fedloom.core.security.subject import Identity, MemberRole
    from fedloom.server.auth.ca import Authority

    assert live.board.certs is not None
    authority = Authority(live.board.certs)
    authority.invite(Identity(MemberRole.OPERATOR, "boss"), 1.0)
    authority.close()

    answer = site(live, TOKENS.operator).post(path, headers=ACT, json={"name": name})

    assert answer.status_code == 409
    assert words in answer.json()["error"]
    assert ("boss", "operator", "invited") in listed(live)


def test_without_certificates_there_is_nobody_to_invite(live: Stage) -> None:
    live.board.certs = None

    answer = site(live, TOKENS.operator).post("/api/invite", headers=ACT, json={"name": "ann"})

    assert answer.status_code == 409
    assert "runs without certificates" in answer.json()["error"]
    assert site(live).get("/api/certificates").json() == {"certificates": None}


def test_the_rounds_of_a_run_are_a_table_for_a_spreadsheet(tmp_path: Path) -> None:
    finished_run(tmp_path / "runs", "sentiment", [0.471, None, 0.556], [0.695, None, 0.67])
    with stage(tmp_path / "runs") as live:
        answer = site(live).get("/api/runs/sentiment/rounds.csv")
        empty = site(live).get(f"/api/runs/{live.board.own}/rounds.csv")
        missing = site(live).get("/api/runs/nothing/rounds.csv")

    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.headers["content-disposition"] == 'attachment; filename="sentiment-rounds.csv"'
    assert [(row["round"], row["updates"], row["lost"], row["accuracy"]) for row in rows] == [
        ("1", "4", "0", ""),
        ("2", "4", "0", "0.556"),
    ]
    assert all(float(row["seconds"]) >= 0 and row["committed_at"] for row in rows)
    assert empty.text.strip() == ",".join(HEADS)
    assert missing.status_code == 404
