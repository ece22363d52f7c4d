"""What the dashboard serves, over real sockets."""

import http.client
import io
import json
import os
import socket
import zipfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load

from fedloom.core.errors import ConfigError, StoreError, UpdateRejected
from fedloom.server.monitoring.dashboard.hosting import hosting
from fedloom.server.storage.local import Store
from tests.dashboard.stage import TOKENS, Stage, config, finished_run, stage

NAN = float("nan")


def fetch(live: Stage, path: str) -> tuple[int, bytes]:
    host = live.url.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def seen(live: Stage, name: str = "") -> dict[str, Any]:
    """The run's document, made anew."""
    live.board._shown.clear()
    status, body = fetch(live, f"/api/runs/{name or live.board.own}")
    assert status == 200
    found: dict[str, Any] = json.loads(body)
    return found


def test_a_run_is_followed_as_it_goes(tmp_path: Path) -> None:
    with stage(tmp_path / "runs", expect=3) as live:
        first = seen(live)
        live.join("ann", "ben", "cat")
        live.rounds(2)
        live.ask()
        live.clients[0].send()
        with pytest.raises(UpdateRejected):
            live.clients[1].send(NAN)
        live.coordinator.tick()
        now = seen(live)

    assert (first["phase"], first["round"], first["rounds"], first["adapter"]) == ("waiting", 0, 10, None)
    assert first["open"]["needed"] == 2
    assert (now["phase"], now["round"], now["adapter"]) == ("open", 2, "state")
    assert (now["open"]["asked"], now["open"]["accepted"], now["open"]["lost"]) == (3, 1, 1)
    states = {each["name"]: (each["state"], each["why"], each["asked"], each["accepted"]) for each in now["clients"]}
    assert states == {
        "ann": ("sent", "", 3, 3),
        "ben": ("lost", "rejected", 3, 2),
        "cat": ("training", "", 3, 2),
    }
    assert now["totals"]["accepted"] == 7
    assert now["totals"]["lost"] == {"rejected": 1}
    payload = 4 * 2 * 8 * 384 * 4
    assert now["curves"]["traffic"] == [
        [1, 3 * payload, 3 * payload],
        [2, 3 * payload, 3 * payload],
        [3, 2 * payload, 2 * payload],
    ]
    kinds = [(each["kind"], each["client"]) for each in now["happened"]]
    assert sorted(kinds) == [
        ("joined", "ann"),
        ("joined", "ben"),
        ("joined", "cat"),
        ("lost", "ben"),
        ("rejected", "ben"),
        ("started", ""),
    ]
    assert kinds[-1] == ("started", ""), "the oldest comes last"
    assert now["config"]["strategy"]["name"] == "fedavg"


def test_epsilon_is_what_the_log_says_each_client_was_asked_for(tmp_path: Path) -> None:
    """The demo's run costs 3.69 after one round, 4.14 after two: the figures of its own output in the README."""
    with stage(tmp_path / "runs", expect=2) as live:
        live.join("ann", "ben")
        live.rounds(1)
        live.ask()
        live.join("cat")
        now = seen(live)
        while any(each["epsilon"] is None for each in now["clients"]):  # accounting is done a little at a time
            now = seen(live)

    spent = {each["name"]: round(each["epsilon"], 2) for each in now["clients"]}
    assert spent == {"ann": 4.14, "ben": 4.14, "cat": 0.0}
    assert round(now["privacy"]["most"], 2) == 4.14
    assert [[number, round(value, 2)] for number, value in now["curves"]["epsilon"]] == [[1, 3.69]]


def test_other_runs_of_the_folder_are_shown_as_they_lie(tmp_path: Path) -> None:
    finished_run(tmp_path / "runs", "sentiment", [0.471, None, 0.556], [0.695, None, 0.67])
    with stage(tmp_path / "runs") as live:
        listed = json.loads(fetch(live, "/api/runs")[1])
        other = seen(live, "sentiment")
        status, body = fetch(live, "/api/runs/sentiment/adapter")

    assert [(each["name"], each["phase"], each["ours"]) for each in listed["runs"]] == [
        ("ward-notes", "running", True),
        ("sentiment", "over", False),
    ]
    assert other["curves"]["accuracy"] == [[0, 0.471], [2, 0.556]]
    assert other["curves"]["loss"] == [[0, 0.695], [2, 0.67]]
    assert (other["phase"], other["totals"]["live"], other["stoppable"]) == ("over", None, False)
    assert status == 200
    names = {"adapter_config.json", "adapter_model.safetensors", "fedloom.json"}
    assert set(zipfile.ZipFile(io.BytesIO(body)).namelist()) == names


def test_a_merged_model_is_offered_where_a_run_left_one(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "sentiment"
    finished_run(tmp_path / "runs", "sentiment", [0.471, 0.556], [0.695, 0.67])
    (run / "adapter").rename(run / "merged")
    with stage(tmp_path / "runs") as live:
        other = seen(live, "sentiment")
        status, body = fetch(live, "/api/runs/sentiment/adapter")

    assert (other["adapter"], status) == ("merged", 200)
    assert "fedloom.json" in zipfile.ZipFile(io.BytesIO(body)).namelist()


def test_the_adapter_so_far_is_what_the_coordinator_holds(tmp_path: Path) -> None:
    with stage(tmp_path / "runs", expect=2) as live:
        assert fetch(live, f"/api/runs/{live.board.own}/adapter")[0] == 404
        live.join("ann", "ben")
        live.rounds(1)
        live.board._shown.clear()
        status, body = fetch(live, f"/api/runs/{live.board.own}/adapter")
        held = live.coordinator.state.adapter

    assert status == 200
    packed = zipfile.ZipFile(io.BytesIO(body))
    tensors = load(packed.read("adapter.safetensors"))
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        name: tensor.tolist() for name, tensor in held.items()
    }
    assert json.loads(packed.read("run.json"))["rounds_done"] == 1


@pytest.mark.parametrize("name", ["..", "%2e%2e", "nothing", "..%2f..%2fetc", "ward-notes%2f..", "%00", "a" * 5000])
def test_a_name_is_looked_up_and_never_made_a_path(live: Stage, name: str) -> None:
    assert fetch(live, f"/api/runs/{name}")[0] in (404, 400)
    assert fetch(live, f"/api/runs/{name}/adapter")[0] in (404, 400)
    assert fetch(live, f"/static/{name}")[0] in (404, 400)


def test_a_log_that_was_tampered_with_is_said_to_be(tmp_path: Path) -> None:
    import sqlite3
    from contextlib import closing

    finished_run(tmp_path / "runs", "sentiment", [0.4, 0.5], [0.7, 0.6])
    with closing(sqlite3.connect(tmp_path / "runs/sentiment/state/run.db")) as db, db:
        db.execute("UPDATE events SET body = replace(body, '600.0', '601.0') WHERE seq = 2")
    with stage(tmp_path / "runs") as live:
        assert "fedloom runs verify" in seen(live, "sentiment")["error"]
        assert seen(live)["error"] is None


def test_health_is_good_only_while_the_state_can_be_written(live: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch(live, "/healthz") == (200, b"ok\n")
    monkeypatch.setattr(live.board, "_probed_s", -1e9)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert fetch(live, "/healthz") == (503, b"the state directory cannot be written: No space left on device\n")
    monkeypatch.setattr(live.board, "_probed_s", -1e9)
    assert fetch(live, "/healthz")[0] == 200


def _taken_over(runs: Path) -> int:
    """The health of a coordinator whose state another one has opened."""
    with stage(runs) as live:
        live.store._lock.close()  # a file system whose locks do not hold
        with Store(live.folder / "state", durable=False):
            status = fetch(live, "/healthz")[0]
        assert status == 503
    return status


def test_health_is_bad_once_another_coordinator_has_the_state(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="another coordinator has opened it"):
        _taken_over(tmp_path / "runs")


def test_a_stop_ends_the_server_and_nothing_is_lost(tmp_path: Path) -> None:
    with stage(tmp_path / "runs", expect=2) as live:
        live.join("ann", "ben")
        live.rounds(1)
        host = live.url.removeprefix("http://").rstrip("/")
        connection = http.client.HTTPConnection(host, timeout=60)
        headers = {"x-fedloom-action": "1", "authorization": f"Bearer {TOKENS.operator}"}
        connection.request("POST", "/api/stop", headers=headers)
        assert connection.getresponse().status == 202
        connection.close()
        while live.observation.stop is not None:
            pass
        assert seen(live)["stoppable"] is False
    with Store(tmp_path / "runs/ward-notes/state") as store:
        assert [event for event in store.events() if type(event).__name__ == "AdapterCommitted"]


def test_a_dashboard_that_breaks_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stage(tmp_path / "runs", config(rounds=2), expect=2) as live:
        monkeypatch.setattr(live.board, "listing", lambda: 1 / 0)
        monkeypatch.setattr(live.observation.metrics, "appended", lambda events, seconds: 1 / 0)
        assert fetch(live, "/api/runs")[0] == 500
        live.join("ann", "ben")
        live.rounds(2)
        assert live.coordinator.finished


def test_visitors_who_say_nothing_keep_no_client_waiting(tmp_path: Path) -> None:
    with stage(tmp_path / "runs", config(rounds=2), expect=2) as live:
        host, _, port = live.url.removeprefix("http://").rstrip("/").rpartition(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(200)]
        live.join("ann", "ben")
        live.rounds(2)
        assert live.coordinator.finished
        for each in idle:
            each.close()


def test_an_address_that_is_taken_is_said_to_be(live: Stage) -> None:
    taken = live.url.removeprefix("http://").rstrip("/")

    with pytest.raises(ConfigError, match="the dashboard cannot listen"), hosting(live.board, taken, TOKENS):
        pass
