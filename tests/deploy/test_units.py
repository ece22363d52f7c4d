"""The systemd units, by systemd's own judgement."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "deploy"
PROGRAM = "/usr/local/lib/fedloom/bin/fedloom"
NAMES = ["fedloom-client.service", "fedloom-server.service"]

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def analyze(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    command = ["systemd-analyze", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def unit(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A unit whose program is there, as verify demands."""
    name = str(request.param)
    text = (UNITS / name).read_text(encoding="utf-8")
    assert text.count(PROGRAM) == 1
    path = tmp_path / name
    path.write_text(text.replace(PROGRAM, sys.executable), encoding="utf-8")
    return path


@pytest.mark.parametrize("unit", NAMES, indirect=True)
def test_systemd_understands_every_line(unit: Path) -> None:
    done = analyze("verify", "--man=no", unit)

    mine = [line for line in done.stderr.splitlines() if unit.name in line]
    assert mine == []


@pytest.mark.parametrize(("unit", "most"), [(NAMES[0], 30), (NAMES[1], 25)], indirect=["unit"])
def test_little_is_left_to_a_unit_that_is_taken_over(unit: Path, most: int) -> None:
    """The exposure that systemd counts, in tenths: 100 for a unit without any protection."""
    done = analyze("security", "--offline=true", f"--threshold={most}", unit)

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


@pytest.mark.parametrize("unit", NAMES, indirect=True)
@pytest.mark.parametrize(
    "line", ["NoNewPrivileges=yes", "ProtectSystem=strict", "Restart=on-failure", "StateDirectoryMode=0700"]
)
def test_what_is_promised_is_there(unit: Path, line: str) -> None:
    assert line in unit.read_text(encoding="utf-8").splitlines()
