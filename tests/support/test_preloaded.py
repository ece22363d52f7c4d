"""The preloaded command is `fedloom` as a user starts it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.preloaded import command

REAL = [sys.executable, "-m", "fedloom.cli.main"]


@pytest.mark.parametrize("line", ["--version", "strategies show nosuch", "strategies --nosuch", "--help"])
def test_it_says_and_ends_as_the_real_one(line: str, tmp_path: Path) -> None:
    real, ours = (
        subprocess.run([*start, *line.split()], capture_output=True, cwd=tmp_path, timeout=120, check=False)
        for start in (REAL, command())
    )

    assert (ours.returncode, ours.stdout, ours.stderr) == (real.returncode, real.stdout, real.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_its_caller(number: signal.Signals, tmp_path: Path) -> None:
    package = tmp_path / "fedloom" / "cli"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    slow = "import os, time\nprint(os.getpid(), os.environ['WORD'], flush=True)\ntime.sleep(300)\n"
    (package / "main.py").write_text(slow)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "WORD": "here"}
    with subprocess.Popen(command(), stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        child, word = process.stdout.readline().split()
        process.send_signal(number)
        assert process.stdout.read() == ""

        assert process.wait(30) == -number
        assert word == "here"
        while Path(f"/proc/{child}").exists():
            time.sleep(0.01)
