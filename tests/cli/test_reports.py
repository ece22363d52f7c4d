"""What commands report to programs, how two runs are compared, how long the rest takes, and completion in a shell."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from fedloom.cli.console import pace
from fedloom.cli.main import app
from fedloom.client.policy import load_policy
from fedloom.client.privacy.ledger.account import anchors_folder, ledger_folder
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError, StoreError
from fedloom.core.privacy.accounting import Spend
from fedloom.core.registry import GROUPS, entries
from fedloom.server.monitoring.recorders.api import JsonLines, RoundRecord, write_config
from fedloom.server.rounds.state import AdapterCommitted, RoundClosed, RoundOpened, UpdateAccepted
from fedloom.server.storage.local import Store

EXAMPLE = Path(__file__).parents[2] / "examples" / "sentiment.toml"
REPORTS = (
    "assets",
    "audit",
    "bench clients",
    "bench dp-step",
    "bench round",
    "bench rounds",
    "bench secagg",
    "certs list",
    "components check",
    "components list",
    "components show",
    "evaluate",
    "export",
    "ledger show",
    "ledger verify",
    "operate status",
    "privacy calibrate",
    "privacy plan",
    "privacy table",
    "runs compare",
    "runs list",
    "runs show",
    "runs verify",
)


def fedloom(*words: str | Path) -> Result:
    done = CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def reported(*words: str | Path, status: int = 0) -> Any:
    """What a command prints with --json: one line."""
    done = fedloom(*words, "--json")
    assert done.exit_code == status
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_every_command_that_reports_does_so_as_json() -> None:
    def leaves(command: Any, path: str) -> Iterator[tuple[str, Any]]:
        for name, child in command.commands.items():
            yield from leaves(child, f"{path}{name} ") if hasattr(child, "commands") else [(f"{path}{name}", child)]

    options = {name: {word for each in one.params for word in each.opts} for name, one in leaves(_root(), "")}
    assert [name for name in REPORTS if "--json" not in options[name]] == []


def _root() -> Any:
    return typer.main.get_command(app)


def test_components_for_programs() -> None:
    names = {each["name"] for each in reported("components", "list", "strategies")}
    groups = {each["group"] for each in reported("components", "list")}
    shown = reported("components", "show", "strategies", "fedsvd")

    assert {"fedavg", "fedsvd", "krum"} <= names
    assert groups == set(GROUPS)
    period = shown["options"]["properties"]["period"]
    assert (period["type"], period["default"]) == ("integer", 1)
    assert shown["description"].startswith("Train B (and the head), average exactly")
    assert reported("components", "check", "codecs") == {"checked": len(entries("codecs")), "faults": []}


def test_assets_for_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path))
    (tmp_path / "minilm-l6").mkdir()

    folders = {each["name"]: each["folder"] for each in reported("assets")}

    assert folders.pop("minilm-l6") == str(tmp_path / "minilm-l6")
    assert {"sentiment", "newsgroups"} <= folders.keys()
    assert set(folders.values()) == {None}


def test_states_for_programs(state: Path) -> None:
    (state.parents[1] / "broken").mkdir()
    (state.parents[1] / "broken" / "run.db").write_bytes(b"no database" * 100)

    damaged, winter = reported("runs", "list", state.parents[1])
    shown = reported("runs", "show", state)
    verified = reported("runs", "verify", state)

    assert "damaged" in damaged
    standing = {"run": "4f" * 16, "rounds_committed": 0, "next": "open", "asked": ["ann", "ben"], "accepted": ["ann"]}
    standing |= {"waiting_for": ["ben"], "lost": {}, "state": str(state)}
    assert winter == {"process": None, **standing}
    assert standing.items() <= shown.items()
    assert shown["events"] == {"RunCreated": 1, "RoundOpened": 1, "UpdateAccepted": 1}
    assert [each["client"] for each in shown["last_audit"]] == ["ann"]
    assert (verified["events"]["records"], verified["files"], verified["trouble"]) == (3, 2, None)
    assert len(verified["events"]["head"]) == 64
    assert reported("runs", "list", state.parents[1] / "none") == []

    update = sha256(b"update").hexdigest()
    (state / "blobs" / update).unlink()
    assert update in reported("runs", "verify", state, status=1)["trouble"]


def test_a_ledger_for_programs(tmp_path: Path) -> None:
    policy = tmp_path / "client.toml"
    policy.write_text('[client]\nname = "a"\nstate = "mine"\n[data]\nsource = "x.csv"\n[privacy]\nepsilon = 3.0\n')
    assert reported("ledger", "show", policy) is None
    assert reported("ledger", "verify", policy) == {"ledger": None, "waiting": 0, "trouble": []}
    site = load_policy(policy)
    with Ledger(ledger_folder(site), "ab" * 16, anchors=anchors_folder(site)) as ledger:
        ledger.release(ledger.reserve("winter", 0, Spend(0.05, 1.5, 20), budget=3.0, delta=1e-5), "cd" * 32)
        spent = ledger.epsilon(1e-5)

    shown, verified = reported("ledger", "show", policy), reported("ledger", "verify", policy)

    assert (shown["spent"], shown["budget"], shown["left"]) == (spent, 3.0, 3.0 - spent)
    (charge,) = shown["charges"]
    assert (charge["run"], charge["round"], charge["noise_multiplier"], charge["released"]) == (
        "winter",
        1,
        1.5,
        "cd" * 32,
    )
    assert shown["rounds_left"] > 1
    assert (verified["ledger"]["charges"], verified["ledger"]["released"]) == (1, 1)
    Path(verified["ledger"]["path"]).unlink()
    assert reported("ledger", "verify", policy, status=1)["trouble"]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two run folders that differ in one key and one option; the second run has not come to its end."""
    found = []
    for name, rate, options in (("one", 4.0, {}), ("two", 2.0, {"period": 2})):
        tables: dict[str, Any] = {
            "run": {"name": "x", "rounds": 2},
            "model": {"base": "b", "labels": ["n", "y"]},
            "train": {"steps": 1, "sampling_rate": 0.1, "learning_rate": rate},
            "strategy": {"name": "fedsvd", "options": options},
        }
        folder = tmp_path / name
        folder.mkdir()
        write_config(folder, RunConfig.model_validate(tables))
        JsonLines(folder).record(RoundRecord(0, 0, 0.5, 0.7, None, None, 0, 0, 0.0))
        JsonLines(folder).record(RoundRecord(1, 2, 0.75, 0.6, {"a": 1.5, "b": 1.0}, None, 10**6, 2 * 10**6, 3.0))
        if name == "one":
            JsonLines(folder).record(RoundRecord(2, 2, 0.8, 0.5, {"a": 2.5, "b": 2.0}, None, 10**6, 2 * 10**6, 6.0))
        found.append(folder)
    one, two = found
    return one, two


def test_two_runs_are_compared(folders: tuple[Path, Path]) -> None:
    document = reported("runs", "compare", *folders)
    table = fedloom("runs", "compare", *folders).stdout

    assert document["differences"] == {"train.learning_rate": [4.0, 2.0], "strategy.options.period": [None, 2]}
    assert [each["rounds"] for each in document["figures"]] == [2, 1]
    assert [each["accuracy"] for each in document["figures"]] == [0.8, 0.75]
    assert [each["epsilon"] for each in document["figures"]] == [2.5, 1.5]
    assert [each["megabytes_up"] for each in document["figures"]] == [2.0, 1.0]
    lines = [line.split() for line in table.splitlines()]
    assert ["train.learning_rate", "4.0", "2.0"] in lines
    assert ["strategy.options.period", "left", "out", "2"] in lines
    assert ["accuracy", "80.0%", "75.0%"] in lines


def test_what_clients_have_scored_is_compared_where_they_have(folders: tuple[Path, Path]) -> None:
    assert "federated accuracy" not in fedloom("runs", "compare", *folders).stdout
    scored: dict[str, float | None] = {
        "accuracy": 0.625,
        "accuracy_margin": 0.04,
        "loss": 0.5,
        "loss_margin": 0.1,
        "standard_error": 0.02,
    }
    JsonLines(folders[1]).record(RoundRecord(2, 2, None, None, None, None, 0, 0, 9.0, None, scored))

    lines = [line.split() for line in fedloom("runs", "compare", *folders).stdout.splitlines()]
    assert ["federated", "accuracy", "none", "62.5%"] in lines
    assert ["federated", "loss", "margin", "none", "0.1"] in lines


def test_only_run_folders_are_compared(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no run\.toml; give run folders"):
        fedloom("runs", "compare", folders[0], tmp_path)
    (folders[1] / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl"):
        fedloom("runs", "compare", *folders)


def test_resume_prints_the_command_that_goes_on(state: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run.toml"
    run.write_bytes(EXAMPLE.read_bytes())

    first, command = fedloom("runs", "resume", state, run).stdout.splitlines()

    assert first == f"{state} is what was written; 0 of 10 rounds are committed"
    assert command == f"fedloom server '{run}' --state {state}"


def test_resume_refuses_what_cannot_go_on(state: Path) -> None:
    with Store(state, durable=False) as store:
        with pytest.raises(StoreError, match=f"process {os.getpid()} works on"):
            fedloom("runs", "resume", state, EXAMPLE)
        blob = store.put_blob(b"s1")
        for number in range(10):
            if number:
                store.append(RoundOpened(number, 0, blob, ("ann",), 60.0), UpdateAccepted(number, "ann", blob, 1.0))
            store.append(RoundClosed(number, ("ann",), "deadline"), AdapterCommitted(number, blob))
    with pytest.raises(StoreError, match=r"all 10 rounds of .* are committed; `fedloom export"):
        fedloom("runs", "resume", state, EXAMPLE)


def test_resume_refuses_a_state_that_is_not_what_was_written(state: Path) -> None:
    (state / "blobs" / sha256(b"update").hexdigest()).write_bytes(b"uptade")

    with pytest.raises(StoreError, match="does not have the bytes its name promises"):
        fedloom("runs", "resume", state, EXAMPLE)


@pytest.mark.parametrize(
    ("round_s", "words"),
    [(1.0, ", about 7 seconds left"), (60.0, ", about 7 minutes left"), (3600.0, ", about 7 hours left")],
)
def test_the_pace_of_the_rounds_tells_how_long_the_rest_takes(round_s: float, words: str) -> None:
    times = iter([100.0, 100.0 + round_s, 100.0 + 8 * round_s])
    rest = pace(12, lambda: next(times))

    # Going on at round 4: the first round that ends shows nothing, since clients were waited for.
    assert [rest(4), rest(5), rest(12)] == ["", words, ""]


@pytest.mark.parametrize(
    ("shell", "typed", "expected"), [("bash", "fedloom comp", "components"), ("bash", "fedloom runs co", "compare")]
)
def test_a_shell_completes_commands(shell: str, typed: str, expected: str) -> None:
    environment = os.environ | {
        "_FEDLOOM_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    code = "import sys; sys.argv[0] = 'fedloom'; from fedloom.cli.main import main; main()"

    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )

    assert done.stdout.split() == [expected], done.stderr
