"""`fedloom audit` on a small model: what it prints, and its exit status."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.client.privacy.auditing import adversarial as adversarial_module
from fedloom.client.privacy.auditing import audit as module
from fedloom.client.privacy.auditing.attacks import Attack
from fedloom.client.privacy.auditing.audit import Audit, Check
from fedloom.core.errors import ConfigError, PolicyError

RUN = """
[run]
name = "small"
rounds = 2

[model]
base = "{base}"
labels = ["negative", "positive"]
max_length = 16

[train]
steps = 3
sampling_rate = 0.3
learning_rate = 0.5

[privacy]
noise_multiplier = 1.0
clip_norm = 0.7
"""

POLICY = """
[client]
name = "site"

[data]
source = "mine.csv"
labels = ["negative", "positive"]
declared_examples = 100

[privacy]
delta = 1e-3
min_noise_multiplier = {floor}
"""


@pytest.fixture
def run_file(tiny_base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(base=tiny_base))
    return path


def policy(folder: Path, floor: float) -> str:
    path = folder / "client.toml"
    path.write_text(POLICY.format(floor=floor))
    return str(path)


def result(lower: float, seen: bool = True) -> Audit:
    check = Check("one step", 100, 1, 1.0, claim=4.4, lower=lower, noise_at_most=1.1, control_seen=seen)
    return Audit((check,), 1e-5, 1.0, 0.7, 10)


@pytest.mark.slow
def test_a_run_is_audited_and_the_figures_are_printed(run_file: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["audit", str(run_file), "--policy", policy(tmp_path, 0.5), "--trials", "300"])

    *_, line = done.stdout.splitlines()
    document = json.loads(line)
    checks = {check["name"]: check for check in document["checks"]}
    assert list(checks) == ["one step", "sampled steps", "whole trainer"]
    assert document["delta"] == 1e-3
    assert document["verdict"] in done.stdout
    # A right mechanism is refuted in at most one audit in a hundred, which this test must not be.
    assert 0 < checks["one step"]["epsilon_at_least"] < 1.2 * checks["one step"]["claimed_epsilon"]
    assert checks["one step"]["control_seen"]
    assert checks["sampled steps"]["control_seen"]
    assert done.exit_code == (0 if document["verdict"] == "consistent" else 1)
    assert not (tmp_path / "fedloom-state").exists(), "an audit charges nothing"


@pytest.mark.parametrize(
    ("found", "verdict", "status"),
    [(result(4.4), "consistent", 0), (result(4.5), "VIOLATION", 1), (result(4.0, seen=False), "blind", 1)],
)
def test_the_exit_status_is_the_verdict(
    found: Audit, verdict: str, status: int, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "audit", lambda *_, **__: found)

    plain = CliRunner().invoke(app, ["audit", str(run_file)])
    machine = CliRunner().invoke(app, ["audit", str(run_file), "--json"])

    assert (plain.exit_code, machine.exit_code) == (status, status)
    assert f"\n{verdict}: " in plain.stdout
    (line,) = machine.stdout.splitlines()
    assert json.loads(line)["verdict"] == verdict


def test_a_bound_without_limit_is_null(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "audit", lambda *_, **__: result(float("inf")))

    document: dict[str, Any] = json.loads(CliRunner().invoke(app, ["audit", str(run_file), "--json"]).stdout)

    assert document["checks"][0]["epsilon_at_least"] is None
    assert document["verdict"] == "VIOLATION"


def test_what_cannot_be_audited_is_refused(run_file: Path, tmp_path: Path) -> None:
    def error(*arguments: str) -> BaseException | None:
        return CliRunner().invoke(app, ["audit", str(run_file), *arguments]).exception

    open_run, strict = error("--set", "privacy.enabled=false"), error("--policy", policy(tmp_path, 2.0))

    assert isinstance(open_run, ConfigError)
    assert "set privacy.enabled = true" in str(open_run)
    assert isinstance(strict, PolicyError)
    assert "noise multiplier 1 (at least 2)" in str(strict)


@pytest.mark.parametrize("fails", [False, True])
def test_attacks_are_printed_and_count(fails: bool, run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Attack("low bits", 100, "standard errors", math.inf if fails else 1.5, 8.0, control_seen=True)
    monkeypatch.setattr(module, "audit", lambda *_, **__: result(4.0))
    monkeypatch.setattr(adversarial_module, "adversarial", lambda *_, **__: (seen,))

    plain = CliRunner().invoke(app, ["audit", str(run_file)])
    done = CliRunner().invoke(app, ["audit", str(run_file), "--adversarial"])

    document = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(plain.stdout.splitlines()[-1])["attacks"] == []
    assert document["attacks"][0]["found"] == (None if fails else 1.5)
    assert document["verdict"] == ("VIOLATION" if fails else "consistent")
    assert done.exit_code == int(fails)
    assert "low bits" in done.stdout
