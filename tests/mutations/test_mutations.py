"""Known ways to lose privacy or updates in silence, each put into a copy of the source: a test must fail.

The lists are mutations.toml, shown in docs/privacy.md, and reliability.toml, shown in docs/track-record.md; patterns.py
says how they are written. Without FEDLOOM_PROVE=1 only those marked quick run.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mutations.patterns import mutate

ROOT = Path(__file__).parents[2]
MUTATIONS: list[dict[str, Any]] = [
    mutation
    for name in ("mutations.toml", "reliability.toml")
    for mutation in tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))["mutation"]
]
FULL = bool(os.environ.get("FEDLOOM_PROVE"))
CHOSEN = [each for each in MUTATIONS if FULL or each.get("quick", False)]
COPIED = (
    "core",
    "proto",
    "strategies",
    "server",
    "client",
    "simulation",
    "flower",
    "api",
    "cli",
    "conformance",
    "tests",
    "examples",
)

Runner = Callable[[Path, list[str]], dict[str, Any]]


@pytest.fixture(scope="module")
def run() -> Iterator[Runner]:
    """Runs tests in a tree and returns the worker's answer."""
    environment = {name: value for name, value in os.environ.items() if name != "FEDLOOM_PROVE"}
    command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    ) as worker:
        stdin, stdout = worker.stdin, worker.stdout
        assert stdin is not None
        assert stdout is not None

        def answer(tree: Path, tests: list[str]) -> dict[str, Any]:
            stdin.write(json.dumps({"tree": str(tree), "tests": tests}) + "\n")
            stdin.flush()
            found: dict[str, Any] = json.loads(stdout.readline())
            return found

        try:
            yield answer
        finally:
            worker.kill()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source and the tests."""
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def killed(answer: dict[str, Any], tests: list[str]) -> list[str]:
    """Those of `tests` of which a case failed by what it asserts."""
    return [test for test in tests if any(each == test or each.startswith((f"{test}[",)) for each in answer["failed"])]


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_the_source_as_it_is_passes_every_named_test(run: Runner, tree: Path) -> None:
    tests = sorted({test for each in CHOSEN for test in each["tests"]})

    answer = run(tree, tests)

    assert answer == {"status": 0, "failed": []}


@pytest.mark.slow
@pytest.mark.prove
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutation", CHOSEN, ids=lambda each: each["name"])
def test_every_mutation_is_killed(mutation: dict[str, Any], run: Runner, tree: Path) -> None:
    path, source = mutate(ROOT, mutation)
    (tree / path).write_text(source, encoding="utf-8")

    answer = run(tree, mutation["tests"])

    assert answer["status"] == 1, "the tests could not be run, or none failed"
    assert killed(answer, mutation["tests"]) == mutation["tests"]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each["name"])
def test_every_mutation_still_fits_the_source(mutation: dict[str, Any]) -> None:
    path, source = mutate(ROOT, mutation)

    assert source != ast.unparse(ast.parse((ROOT / path).read_text(encoding="utf-8"))) + "\n", "it changes nothing"
    compile(source, path, "exec")
    assert mutation["tests"], "name the tests that must fail"
    for test in mutation["tests"]:
        file, _, function = test.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), f"{test} does not exist"


def test_names_are_unique_and_many_run_everywhere() -> None:
    names = [each["name"] for each in MUTATIONS]

    assert len(set(names)) == len(names)
    assert sum(each.get("quick", False) for each in MUTATIONS) >= 12
