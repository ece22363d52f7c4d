"""`fedloom server --held-out` with real clients, and `fedloom evaluate` on what it leaves."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fedloom.cli.main import app
from fedloom.client.data.rows import Rows
from fedloom.core.errors import ConfigError, DataError, ModelError, StoreError
from fedloom.server.monitoring.recorders.api import read_metrics
from tests.support import preloaded

COMMAND = [sys.executable, "-u", "-m", "fedloom.cli.main"]
POLICY = (
    '[client]\nname = "{name}"\n[data]\nsource = "{name}.csv"\n[privacy]\nepsilon = 3.0\nallow_non_private = true\n'
)


def write(path: Path, rows: Rows, part: range) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("text", "label"), *((rows.texts[i], rows.label_names[rows.labels[i]]) for i in part)])


@pytest.fixture
def site(tmp_path: Path, tiny_base: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run file, its prepared schema, two clients and a file of held-out rows."""
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(
        f"""
        run = {{ name = "tiny", rounds = 3, seed = 4 }}
        model = {{ base = "{tiny_base}", labels = ["negative", "positive"], max_length = 16 }}
        adapter = {{ rank = 4, alpha = 8 }}
        train = {{ steps = 3, sampling_rate = 0.5, learning_rate = 0.3 }}
        privacy = {{ enabled = false }}
        evaluation = {{ every = 2, max_examples = 9 }}
        """
    )
    for name, part in (("a", range(12)), ("b", range(12, 24)), ("held_out", range(24, 40))):
        write(Path(f"{name}.csv"), rows, part)
    for name in ("a", "b"):
        Path(f"{name}.toml").write_text(POLICY.format(name=name) + '[compute]\ndevice = "cpu"\nthreads = 1\n')
    assert invoke("prepare", "run.toml").exit_code == 0
    return tmp_path


def invoke(*words: str | Path) -> Result:
    done = CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def evaluated(*words: str | Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(invoke("evaluate", "run.toml", *words, "--json").stdout)
    return document


def served(*options: str, meanwhile: Callable[["subprocess.Popen[str]"], None] = lambda server: None) -> str:
    """What a coordinator says in a run with both clients, each a process; all end well."""
    open_line = ["--insecure-loopback"]
    with ExitStack() as stack:
        command = [*COMMAND, "server", "run.toml", "--listen", "127.0.0.1:0", *open_line, *options]
        log = stack.enter_context(Path("server.log").open("w"))
        server = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True))
        stack.callback(server.kill)
        assert server.stdout is not None
        said = ""
        while "listening on" not in said:
            line = server.stdout.readline()
            assert line, Path("server.log").read_text()
            said += line
        address = said.partition("listening on ")[2].partition(";")[0]
        meanwhile(server)
        clients = []
        for name in ("a", "b"):
            command = [*preloaded.command(), "client", "--server", address, "--policy", f"{name}.toml", *open_line]
            output = stack.enter_context(Path(f"{name}.log").open("w"))
            client = stack.enter_context(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))
            stack.callback(client.kill)
            clients.append(client)
        said += server.communicate(timeout=240)[0]
        assert server.returncode == 0, Path("server.log").read_text()
        assert [client.wait(60) for client in clients] == [0, 0]
    return said


@pytest.mark.slow
@pytest.mark.e2e
def test_what_a_coordinator_scores_is_what_evaluate_says(site: Path) -> None:
    said = served("--held-out", "held_out.csv")

    records = read_metrics(site / "runs/tiny")
    assert "held_out.csv is scored after every 2 rounds and the last" in said
    assert [(each.round, each.accuracy is None, each.loss is None) for each in records] == [
        (1, True, True),
        (2, False, False),
        (3, False, False),
    ]
    found = evaluated("--state", "runs/tiny/state", "--data", "held_out.csv")
    assert found["now"]["accuracy"] == records[-1].accuracy
    assert found["now"]["loss"] == pytest.approx(records[-1].loss, abs=1e-6)
    assert found["start"]["loss"] != pytest.approx(found["now"]["loss"], abs=1e-3)
    assert (found["rounds"], found["examples"], found["state"]) == (3, 9, "runs/tiny/state")
    # What the run left for PEFT is the same adapter, and without either option the run's own state is meant.
    exported = evaluated("--adapter", "runs/tiny/adapter", "--data", "held_out.csv")
    assert exported["now"]["accuracy"] == records[-1].accuracy
    assert exported["now"]["loss"] == pytest.approx(records[-1].loss, abs=1e-5)
    assert exported["start"] == found["start"]
    assert evaluated("--data", "held_out.csv", "--max-examples", "40")["examples"] == 16
    table = invoke("evaluate", "run.toml", "--data", "held_out.csv").stdout
    assert f"{records[-1].accuracy:.1%}" in table
    assert "9 examples of held_out.csv" in table

    adapter, data = site / "runs/tiny/adapter", ("--data", "held_out.csv")
    known = json.loads((adapter / "fedloom.json").read_text())
    for key, value in (("base_digest", f"sha256:{'0' * 64}"), ("task", "causal-lm"), ("labels", ["a", "b"])):
        (adapter / "fedloom.json").write_text(json.dumps(known | {key: value}))
        with pytest.raises(ModelError, match=f"was trained with {key} .* give the run file that it was trained with"):
            evaluated("--adapter", adapter, *data)
    with pytest.raises(ConfigError, match="of another run file or base model"):
        evaluated(*data, "--set", "train.steps=4")


@pytest.mark.slow
@pytest.mark.e2e
def test_a_scorer_that_dies_stops_nobody(site: Path) -> None:
    def kill(server: "subprocess.Popen[str]") -> None:
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        (scorer,) = (int(each) for each in children if b"fedloom.client.eval.worker" in _words(each))
        os.kill(scorer, 9)

    said = served("--held-out", "held_out.csv", meanwhile=kill)

    assert "run over; adapter in" in said
    assert [(each.round, each.accuracy) for each in read_metrics(site / "runs/tiny")] == [
        (1, None),
        (2, None),
        (3, None),
    ]
    log = (site / "server.log").read_text()
    assert log.count("held-out rows are not scored from round 2 on") == 1
    assert "has ended with status -9" in log


def _words(process: str) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()


def test_what_cannot_be_scored_is_said_before_anything_is_loaded(site: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no \[data\] section; name a file"):
        evaluated()
    with pytest.raises(ConfigError, match="one adapter is scored at a time"):
        evaluated("--adapter", "x", "--state", "y")
    with pytest.raises(StoreError, match=r"runs/tiny/state does not exist; give .* --state, or --adapter"):
        evaluated("--data", "held_out.csv")
    with pytest.raises(ModelError, match="nowhere holds no adapter that a run left"):
        evaluated("--adapter", "nowhere", "--data", "held_out.csv")
    with pytest.raises(DataError, match=r"'none\.csv' does not exist"):
        evaluated("--adapter", "nowhere", "--data", "none.csv")


def test_a_server_does_not_start_with_rows_that_it_cannot_score(site: Path) -> None:
    words = ("server", "run.toml", "--insecure-loopback", "--listen", "127.0.0.1:0", "--held-out")

    with pytest.raises(ConfigError, match=r"'none\.csv' does not exist"):
        invoke(*words, "none.csv")

    assert not (site / "runs").exists()
