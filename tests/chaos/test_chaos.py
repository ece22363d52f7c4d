"""Every scenario in its small size, each in a process of its own; what they do at full size is `make chaos`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import faults, kills

ROOT = Path(__file__).parents[2]


def report(scenario: str) -> dict[str, Any]:
    """The scenario's figures, once nothing failed in it."""
    command = [sys.executable, "-m", "tests.chaos.suite", "--size", "ci", scenario]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)[scenario]
    assert not found["failures"], "\n".join(found["failures"].values())
    assert done.returncode == 0
    return found


def test_the_chains_reach_every_failpoint_once() -> None:
    texts = [text for arms in kills.chains(1, 6) for node in arms.values() for text in node]
    points = [text.partition("=")[0] for text in texts]

    primers = {text.partition("=")[0] for text in kills.PRIMED.values()}
    assert set(points) == set(kills.POINTS)
    assert all(points.count(point) == 1 for point in kills.POINTS if point not in primers)
    assert all("=crash" in text for text in texts)


def test_the_grid_has_every_failpoint_in_every_phase_and_way() -> None:
    cells = kills.cells(dict.fromkeys(kills.POINTS, 9), actions=("crash", "raise", "ambiguous", "sleep:0.3"))

    assert {name.partition("-")[0] for name in cells} == set(kills.POINTS)
    assert {f"history.folded-crash-{nth}" for nth in (1, 5, 9)} <= cells.keys()
    assert cells["line.submit-ambiguous-5"] == {"c0": ["line.submit=ambiguous@5"]}
    assert cells["history.reread-crash-1"] == {"server": ["rpc.submit.taken=crash@1", "history.reread=crash@1"]}


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_every_failpoint_the_run_comes_to_the_same() -> None:
    found = report("kill grid")

    texts = sum(len(texts) for arms in kills.chains(1, 6) for texts in arms.values())
    assert found["restarts"] >= texts - 6, "some of those killed last need not come back"


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_times_the_coordinator_comes_to_the_same() -> None:
    figures = report("random kills")["figures"].values()

    assert sum(each["kills"] for each in figures) >= 30


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_times_everybody_together_comes_to_the_same() -> None:
    figures = report("storms")["figures"].values()

    assert all(each["kills"] >= 10 for each in figures)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rounds_close_without_those_who_die_in_them() -> None:
    (figures,) = report("dropout")["figures"].values()

    assert figures["kills"] > figures["rounds"]
    assert figures["needed"] * figures["rounds"] <= figures["answered"] < figures["asked"]
    assert figures["full_cohorts"] > 0
    assert figures["full_opened_again"] == 0


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_of_two_coordinators_on_one_state_only_one_writes() -> None:
    assert report("split brain")["trials"] == 1


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(faults.COMPILER is None, reason="needs a C compiler for the library that moves the clock")
def test_no_clock_that_jumps_decides_anything() -> None:
    (figures,) = report("clock")["figures"].values()

    assert figures["jumps"] >= 5


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_clients_come_back_to_a_coordinator_that_was_killed() -> None:
    (figures,) = report("many clients")["figures"].values()

    assert figures["clients"] == 60


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_too_much_is_told_when_to_come_back_and_gets_through() -> None:
    (figures,) = report("overload")["figures"].values()

    assert figures["refusals"] > 0
    assert figures["clients"] == 2 * figures["capacity"]


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rounds_that_go_on_take_no_more_files_and_threads() -> None:
    (figures,) = report("soak")["figures"].values()

    assert figures["rounds"] >= 10
