import ast
import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedloom.core.errors import ConfigError, LedgerError, StoreError, Unavailable
from fedloom.core.runtime.failpoints import CALLS, ENVIRONMENT, LINES, arm, failpoint, hits, reach

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    arm("")


def placed() -> Counter[tuple[str, str]]:
    """(function, name) of every failpoint in the source."""
    found: Counter[tuple[str, str]] = Counter()
    for path in ROOT.glob("*/fedloom/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("reach", "failpoint")
            ):
                found[node.func.id, ast.literal_eval(node.args[0])] += 1
    return found


def test_every_failpoint_is_in_the_code_once_and_in_the_registry() -> None:
    registered = {("failpoint", name): 1 for name in CALLS} | {("reach", name): 1 for name in LINES}

    assert placed() == registered
    assert len(registered) >= 40
    assert not CALLS.keys() & LINES.keys()
    assert all(meaning[0].islower() and len(meaning) > 15 for meaning in (CALLS | LINES).values())


def test_nothing_is_armed_and_calls_are_left_alone() -> None:
    def call() -> int:
        return 1

    assert failpoint("store.append")(call) is call
    reach("store.appended")
    assert not hits


def test_the_nth_time_fails_and_no_other() -> None:
    arm("store.appended=raise@2; line.work=raise")

    @failpoint("line.work")
    def work(number: int) -> int:
        return number + 1

    reach("store.appended")
    with pytest.raises(StoreError, match=r"failpoint store\.appended"):
        reach("store.appended")
    reach("store.appended")
    with pytest.raises(Unavailable):
        work(1)
    assert work(1) == 2
    assert hits == {"store.appended": 3, "line.work": 2}


def test_an_ambiguous_call_is_done_and_fails() -> None:
    arm("ledger.reserve=ambiguous@2")
    done: list[int] = []

    @failpoint("ledger.reserve")
    def reserve(number: int) -> None:
        done.append(number)

    reserve(1)
    with pytest.raises(LedgerError):
        reserve(2)
    assert done == [1, 2]


def test_a_coroutine_fails_too() -> None:
    arm("rpc.join=ambiguous")
    done: list[str] = []

    @failpoint("rpc.join")
    async def join() -> None:
        done.append("joined")

    with pytest.raises(OSError, match=r"failpoint rpc\.join"):
        asyncio.run(join())
    assert done == ["joined"]


def test_sleeping_delays_and_does_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    arm("serve.tick=sleep:0.25@2")

    for _ in range(3):
        reach("serve.tick")

    assert [each for each in slept if each] == [0.25]


def test_a_crash_is_sigkill_and_the_environment_arms_it() -> None:
    lines = ("reach('serve.tick')", "print('alive', flush=True)", "reach('serve.tick')")
    code = "\n".join(("from fedloom.core.runtime.failpoints import reach", *lines))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, ENVIRONMENT: "serve.tick=crash@2"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "alive\n")


@pytest.mark.parametrize(
    "text",
    ["store.appended", "store.appended=explode", "no.such=crash", "store.appended=crash@", "serve.tick=ambiguous"],
)
def test_what_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        arm(text)
