"""Runs tests in one tree after another, each in a fork of an interpreter that has loaded torch once.

Reads lines of JSON, {"tree": FOLDER, "tests": [PYTEST ID, ...]}, and answers each with one line of JSON: pytest's exit
status and the ids that failed while the test itself ran. An error while collecting or setting up is no failure.
"""

import importlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

PARTS = ("core", "proto", "strategies", "server", "client", "simulation", "api", "cli", "conformance")
# Read and not imported: tests of one tree are not to find another's modules.
HEAVY = runpy.run_path(str(Path(__file__).parents[1] / "support" / "preloaded.py"))["HEAVY"]


class Failures:
    """A pytest plugin that notes which tests failed by what they assert."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.failed:
            self.ids.append(report.nodeid)


def run(tree: Path, tests: list[str], answer: int) -> None:
    """Run in `tree` and write the answer; anything printed goes to the standard error."""
    import pytest

    os.dup2(2, 1)
    os.chdir(tree)
    paths = [str(tree / part) for part in PARTS]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for tests that start processes
    failures = Failures()
    options = ["-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-c", "pyproject.toml", "--rootdir", "."]
    # What this interpreter has loaded before pytest came needs no rewriting: it holds no assertion of a test.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = int(pytest.main([*options, *tests], plugins=[failures]))
    os.write(answer, json.dumps({"status": status, "failed": failures.ids}).encode())


def main() -> None:
    """Answer until standard input ends."""
    # Loading these takes seconds, which the forks need not spend again.
    for name in HEAVY:
        importlib.import_module(name)

    for line in sys.stdin:
        task = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(read)
                run(Path(task["tree"]), task["tests"], write)
            finally:
                os._exit(0)  # the pipe that closes is the answer, even after an error
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        sys.stdout.write((answer or b'{"status": -1, "failed": []}').decode() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
