"""`fedloom runs`, as an operator meets it."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedloom.cli.main import app
from fedloom.core.errors import StoreError
from fedloom.server.rounds.state import AdapterCommitted, RoundClosed, RunEnded
from fedloom.server.storage.audit_log import AuditRecord
from fedloom.server.storage.follow import Journal
from fedloom.server.storage.local import Store
from fedloom.server.storage.verify import holder


def runs(*words: str | Path) -> Result:
    done = CliRunner().invoke(app, ["runs", *map(str, words)], env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_list_and_show_say_where_runs_stand(state: Path) -> None:
    (state.parents[1] / "broken").mkdir()
    (state.parents[1] / "broken" / "run.db").write_bytes(b"no database" * 100)

    table = runs("list", state.parents[1]).stdout
    text = runs("show", state).stdout

    (line,) = [each for each in table.splitlines() if "winter" in each]
    assert line == f"{state}: run 4f4f4f4f, 0 rounds committed; round 1 is open; no coordinator works on it"
    assert "damaged" in table
    assert "0 rounds committed; round 1 is open" in text
    assert "asked 2 clients: 1 updates accepted, waiting for 1, 0 lost" in text
    assert "1 RoundOpened, 1 RunCreated, 1 UpdateAccepted" in text
    assert "joined 'ann' 'said hello'" in text


def test_who_took_part_and_that_a_run_is_over_is_said(state: Path) -> None:
    (state.parent / "run.toml").write_text(
        """
        run = { name = "winter", rounds = 1 }
        model = { base = "tiny", labels = ["no", "yes"] }
        train = { steps = 1, sampling_rate = 0.5, learning_rate = 0.1 }
        """
    )
    with Store(state, durable=False) as store:
        store.append(RoundClosed(0, ("ann",), "deadline"), AdapterCommitted(0, store.put_blob(b"s1")))
        store.note(AuditRecord("2026-01-01T00:00:00+00:00", 1, "declined", "ben", "refuses"))
    over = runs("show", state).stdout
    (state.parent / "run.toml").unlink()

    assert "1 of 1 rounds committed; the run is over" in over
    assert "took part: ann in 1 rounds" in over
    assert "refused to take part: ben; their own logs say why" in over
    assert "1 rounds committed; no round is open" in runs("show", state).stdout
    with Store(state, durable=False) as store:
        store.append(RunEnded(1, "told"))
    assert "1 rounds committed; the run was ended with them" in runs("show", state).stdout


def test_how_often_it_was_opened_is_counted_and_an_export_starts_no_coordinator(state: Path) -> None:
    """Three openings are three, and none of them alone is a start: that is what a coordinator notes once it serves."""
    assert "opened once" in runs("show", state).stdout
    for _ in range(2):
        with Store(state, durable=False):
            pass

    assert "opened 3 times" in runs("show", state).stdout
    journal = Journal(state)
    journal.refresh()
    assert (journal.epoch, journal.starts) == (3, 0)


def test_listing_nothing_says_so(tmp_path: Path) -> None:
    assert "no state directories" in runs("list", tmp_path).stdout


def test_verify_prints_heads_that_a_later_verify_knows(state: Path) -> None:
    done = runs("verify", state)
    head = done.stdout.split("head ")[1].split()[0]
    with Store(state, durable=False) as store:
        store.append(RoundClosed(0, ("ann",), "deadline"), AdapterCommitted(0, store.put_blob(b"s1")))

    again = runs("verify", state, "--head", head)

    assert "events: 3 records" in done.stdout
    assert "2 files: as named" in done.stdout
    assert (again.exit_code, "events: 5 records" in again.stdout) == (0, True)
    assert runs("verify", state, "--head", "ab" * 32).exit_code == 1


def test_verify_finds_a_changed_and_a_missing_file(state: Path) -> None:
    with Store(state, durable=False) as store:
        update = store.put_blob(b"update")
    blob = state / "blobs" / update

    blob.write_bytes(b"uptade")
    assert (runs("verify", state).exit_code, update in runs("verify", state).stderr) == (1, True)
    blob.unlink()
    assert (runs("verify", state).exit_code, update in runs("verify", state).stderr) == (1, True)


HOLD = """
import signal, sys
from pathlib import Path
from fedloom.server.rounds.state import RoundClosed
from fedloom.server.storage.local import Store
with Store(Path(sys.argv[1])) as store:
    store.append(RoundClosed(0, ("ann",), "deadline"))
    print("open", flush=True)
    if sys.argv[2] == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("deaf", flush=True)
    signal.pause()
"""


@pytest.fixture(params=["ends", "deaf"])
def coordinator(state: Path, request: pytest.FixtureRequest) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has the directory open, and ends when it is told to or does not listen."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, state, request.param], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(2 if request.param == "deaf" else 1):
        process.stdout.readline()
    process.deaf = request.param == "deaf"  # type: ignore[attr-defined]  # for the test below
    yield process
    process.kill()
    process.communicate()


def test_a_running_coordinator_is_looked_at_and_stopped(state: Path, coordinator: "subprocess.Popen[str]") -> None:
    assert holder(state) == coordinator.pid
    assert f"process {coordinator.pid}" in runs("list", state.parents[1]).stdout
    done = runs("verify", state)
    assert (done.exit_code, "events: 4 records" in done.stdout) == (0, True), "what the other process has written"
    assert "its files were not read" in done.stdout

    if coordinator.deaf:  # type: ignore[attr-defined]  # set by the fixture
        with pytest.raises(StoreError, match=f"process {coordinator.pid} has not ended within 0.2 s"):
            runs("stop", state, "--wait-s", "0.2")
        return
    assert "stopped" in runs("stop", state).stdout
    assert coordinator.wait(10) == -signal.SIGTERM
    assert "no coordinator works on" in runs("stop", state).stdout
