"""The `fedloom` command as a user meets it: real processes, their output and their exit status."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.cli.simulation.simulate import _line
from fedloom.client.assets.fetch import ASSETS
from fedloom.core.config.run import load_run
from fedloom.core.schema import Schema
from fedloom.server.monitoring.recorders.api import RoundRecord
from fedloom.server.rounds.state import AdapterCommitted, RoundClosed, RoundOpened, RunCreated, RunEnded, UpdateAccepted
from fedloom.server.storage.local import Store
from tests.support.preloaded import fedloom

EXAMPLE = Path(__file__).parents[2] / "examples" / "sentiment.toml"
COMMAND = [sys.executable, "-m", "fedloom.cli.main"]
OPEN = ("--set", "privacy.enabled=false")
LOOPBACK = "--insecure-loopback"
"""Spares tests that are not about privacy the calibration of the noise, which takes seconds."""


def refused(*arguments: str | Path) -> str:
    """The one line with which a command refuses."""
    done = fedloom(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(("words", "level"), [((), "NONE"), (("--verbose",), "ERROR")])
def test_grpc_has_no_lines_of_its_own_unless_asked(
    words: tuple[str, ...], level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)

    assert CliRunner().invoke(app, [*words, "components", "list"]).exit_code == 0

    assert os.environ["GRPC_VERBOSITY"] == level
    script = "import sys, fedloom.cli.main; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0, "it is set too late"


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_bytes(EXAMPLE.read_bytes())
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file beside which `fedloom prepare` has put its schema."""
    path = tmp_path_factory.mktemp("prepared") / "run.toml"
    path.write_bytes(EXAMPLE.read_bytes())

    done = fedloom("prepare", path)

    assert done.returncode == 0, done.stderr
    written = path.with_suffix(".schema.json")
    assert f"wrote {written}" in done.stdout
    assert f"base model {json.loads(written.read_text())['digest']}\n" in done.stdout
    return path


def test_version() -> None:
    done = fedloom("--version")

    assert (done.returncode, done.stdout) == (0, f"fedloom {version('fedloom')}\n")


def test_help_names_every_command() -> None:
    done = fedloom("--help")

    assert done.returncode == 0
    for name in ("simulate", "server", "prepare", "client", "audit", "assets", "components", "ledger", "bench"):
        assert re.search(rf"^\W*{name}\s", done.stdout, re.M)


@pytest.mark.parametrize("command", ["simulate", "server", "prepare"])
def test_an_unknown_key_is_one_line_with_the_nearest_key(command: str, run_file: Path) -> None:
    line = refused(command, run_file, "--set", "run.ruonds=3")

    assert line == f"{run_file}: unknown key 'run.ruonds'; did you mean 'rounds'?"


@pytest.mark.parametrize("command", ["simulate", "server", "prepare"])
def test_a_missing_run_file_is_named(command: str, tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"

    assert refused(command, missing) == f"{missing} does not exist; give the path of a TOML file"


def test_an_unknown_strategy_in_a_run_file_leaves_no_run_folder(run_file: Path, tmp_path: Path) -> None:
    line = refused("simulate", run_file, *OPEN, "--set", "strategy.name=nosuch", "--out", tmp_path / "runs")

    assert "unknown strategy 'nosuch'" in line
    assert not (tmp_path / "runs").exists()


def test_a_wrong_policy_key_is_named(tmp_path: Path) -> None:
    policy = tmp_path / "client.toml"
    policy.write_text('[client]\nname = "a"\n[data]\nsource = "x.csv"\n[privacy]\nepsilom = 3\n')

    line = refused("client", "--server", "127.0.0.1:1", "--policy", policy)

    assert line == f"{policy}: unknown key 'privacy.epsilom'; did you mean 'epsilon'?"


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [({"a": 1.504, "b": 1.501}, "epsilon 1.50  2"), ({"a": 0.0, "b": 3.69}, "epsilon 0.00 to 3.69  2"), (None, "  2")],
)
def test_a_rounds_line_has_what_the_clients_spent(
    epsilon: dict[str, float] | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = RoundRecord(1, 2, 0.75, 0.5, epsilon, None, 300_000, 1_200_000, 45.2)

    _line(load_run(EXAMPLE), record)

    printed = capsys.readouterr().out
    assert (
        printed == f"round   1/10  accuracy 75.0%  loss 0.500  {words.strip()} clients  up 0.3 MB  down 1.2 MB  45 s\n"
    )


def test_assets_are_listed() -> None:
    done = fedloom("assets")

    assert done.returncode == 0
    for name, asset in ASSETS.items():
        assert re.search(
            rf"^{name}  .*{re.escape(asset.requirement)}; (in the cache|not fetched)\)$", done.stdout, re.M
        )


def test_an_unknown_asset_gets_the_nearest_name() -> None:
    assert refused("assets", "sentimant") == "unknown asset 'sentimant'; did you mean 'sentiment'?"


def test_prepare_writes_what_a_coordinator_needs(prepared: Path) -> None:
    document = json.loads(prepared.with_suffix(".schema.json").read_text())

    schema = Schema.from_json(json.dumps(document["schema"], separators=(",", ":")))
    assert re.fullmatch("sha256:[0-9a-f]{64}", document["digest"])
    # Four layers with a pair of rank 8 on query and value of width 384, and a head of 2 x 384 weights and 2 biases.
    assert schema.size == 4 * 2 * 2 * 8 * 384 + 2 * 384 + 2
    assert schema.scale == 16 / 8


def test_a_coordinator_refuses_other_interfaces(prepared: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    line = refused("server", prepared, *OPEN, LOOPBACK, "--listen", "0.0.0.0:0", "--state", state)

    assert line.startswith("address '0.0.0.0:0' is not a loopback address")
    assert "fedloom certs" in line


def test_without_certificates_nothing_is_served_unless_asked_for(prepared: Path, tmp_path: Path, policy: Path) -> None:
    nowhere = tmp_path / "nowhere"

    assert f"no certificates in {nowhere}" in refused("server", prepared, *OPEN, "--certs", nowhere)
    line = refused("client", "--server", "127.0.0.1:1", "--policy", policy)
    assert f"{policy.parent / 'mine' / 'certs' / 'member.pem'} cannot be read" in line
    assert "enrol" in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.rank=4", "was made for another [adapter] section"),
        ("model.max_length=48", "was made for another [model] section"),
        (f"model.digest=sha256:{'0' * 64}", "the run file pins sha256:0000"),
    ],
)
def test_a_stale_schema_file_is_refused(prepared: Path, tmp_path: Path, override: str, words: str) -> None:
    assert words in refused("server", prepared, LOOPBACK, "--set", override, "--state", tmp_path / "state")


def test_a_coordinator_refuses_rounds_that_make_no_sense_before_it_has_a_state(prepared: Path, tmp_path: Path) -> None:
    line = refused(
        "server",
        prepared,
        *OPEN,
        LOOPBACK,
        "--set",
        "rounds.mode=buffered",
        "--set",
        "strategy.name=ffa",
        "--state",
        tmp_path / "state",
    )

    assert line.startswith('rounds.mode = "buffered" needs rounds.clients_per_round')
    assert not (tmp_path / "state").exists()


def test_an_incomplete_schema_file_is_refused(run_file: Path, tmp_path: Path) -> None:
    run_file.with_suffix(".schema.json").write_text('{"model": {}}')

    line = refused("server", run_file, LOOPBACK, "--state", tmp_path / "state")

    assert "lacks adapter, digest, schema; run `fedloom prepare" in line


def test_a_coordinator_listens_and_stops_when_told(prepared: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    command = [*COMMAND, "server", str(prepared), *OPEN, LOOPBACK, "--listen", "127.0.0.1:0", "--state", str(state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            warning, first = server.stdout.readline(), server.stdout.readline()
            server.send_signal(signal.SIGTERM)
            rest, complaints = server.communicate(timeout=60)
        finally:
            server.kill()

    assert re.fullmatch(rf"listening on 127\.0\.0\.1:[1-9]\d*; state in {re.escape(str(state))}\n", first), complaints
    assert warning.startswith("insecure: nothing is encrypted")
    assert server.returncode == 0, complaints
    assert rest == "stopped; start again with the same state directory to go on\n"


def test_a_run_that_is_over_does_not_listen(prepared: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    command = ("server", str(prepared), *OPEN, LOOPBACK, "--listen", "127.0.0.1:0", "--state", str(state))
    with subprocess.Popen([*COMMAND, *command], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        first.stdout.readline(), first.stdout.readline()
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=60)
    with Store(state) as store:
        (created,) = store.events()
        assert isinstance(created, RunCreated)
        same = created.state
        store.append(RoundOpened(0, 0, same, ("ann",), 60.0), UpdateAccepted(0, "ann", same, 1.0))
        store.append(RoundClosed(0, ("ann",), "complete"), AdapterCommitted(0, same), RunEnded(1, "told"))
    with subprocess.Popen([*COMMAND, *command], stdout=subprocess.PIPE, text=True) as again:
        assert again.stdout is not None
        lines = [again.stdout.readline() for _ in range(3)]
        again.kill()

    assert lines[1].startswith("this run is over, with 1 of ")
    assert "for a moment, then this ends" in lines[2]
    assert "listening" not in "".join(lines)


def test_an_identity_is_printed_as_the_line_its_peers_pin(policy: Path) -> None:
    once, again = fedloom("identity", policy), fedloom("identity", policy)

    assert once.returncode == 0
    assert once.stdout == again.stdout
    (key,) = tomllib.loads(once.stdout).values()
    assert re.fullmatch(r"[0-9a-f]{64}", key)
    private = (policy.parent / "mine" / "identity.key").read_text()
    assert private not in once.stdout


def figures(*arguments: str) -> dict[str, Any]:
    """What a benchmark prints for programs after its table, checked for what every benchmark has."""
    done = fedloom("bench", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    head, *table, line = done.stdout.splitlines()
    document: dict[str, Any] = json.loads(line)
    assert document["bench"] == arguments[0]
    assert head.split() == ["figure", "value"]
    assert {row.split()[0] for row in table} == document.keys() - {"bench", "machine", "versions"}
    assert document["machine"]["cores"] > 0
    assert document["versions"]["fedloom"] == version("fedloom")
    return document


@pytest.mark.e2e
def test_the_round_benchmark_ends_with_its_figures() -> None:
    document = figures("round", "--rounds", "5")

    assert 0 < document["median_ms"] <= document["p95_ms"]
    assert document["mean_ms"] > 0
    assert document["ratio_to_raw_grpc"] > 0
    assert document["raw_grpc_ms"] > 0
    assert (document["rounds"], document["clients"], document["parameters"]) == (5, 2, 786_432)
    assert document["durable"] is False
    assert document["tls"] is False


def test_the_rounds_benchmark_ends_with_its_figures() -> None:
    document = figures("rounds", "--clients", "64", "--rounds", "2")

    parts = document["playing_s_per_round"] + document["folding_s_per_round"]
    assert document["state_machine_s_per_round"] == parts > 0
    assert document["growth_per_doubling"] > 0
    assert (document["clients"], document["rounds"]) == (64, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux")
def test_the_commit_benchmark_ends_with_its_figures() -> None:
    document = figures("commit", "--width", "512", "--layers", "2")

    assert document["speedup_vs_dense"] > 1
    assert document["commit_64_layers_s"] == pytest.approx(32 * document["commit_layers_s"])
    assert document["rss_ratio_200_to_10_clients"] < 1.5
    assert document["keeps_updates"] is False
    kept = figures("commit", "--strategy", "lora-fair", "--width", "512", "--layers", "2")
    assert kept["rss_ratio_200_to_10_clients"] > 3


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(900)  # it measures, and a busy machine must not fail it
def test_the_step_benchmark_ends_with_its_figures() -> None:
    document = figures("dp-step", "--repeats", "1")

    for name in ("ours", "opacus_hooks", "opacus_ghost"):
        assert document[f"ratio_{name}"] > 0
        assert document[f"{name}_ms"] > 0
        if sys.platform == "linux":
            assert document[f"peak_memory_ratio_{name}"] > 0
    assert document["repeats"] == 1


@pytest.mark.e2e
def test_the_secure_sum_benchmark_ends_with_its_figures() -> None:
    document = figures("secagg", "--rounds", "3", "--clients", "3", "--parameters", "20000")

    assert document["parameters"] == 20000
    assert document["clients"] == 3
    assert document["ratio"] > 0
    assert document["secure_client_cpu_ms"] > 0
