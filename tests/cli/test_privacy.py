"""`fedloom privacy` as a user meets it: what it prints is what the accountant says, and mistakes are one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedloom.cli.client.privacy import _first_unsafe
from fedloom.client.policy import load_policy
from fedloom.client.privacy.ledger.account import anchors_folder, ledger_folder
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.core.privacy.accounting import GRID, Spend, calibrate, epsilon, rounds_left, statement
from tests.support.preloaded import fedloom

RUN = """
run = { name = "flu", rounds = 4 }
model = { base = "none", labels = ["no", "yes"] }
train = { steps = 5, sampling_rate = 0.05, learning_rate = 0.1 }
privacy = { epsilon = 5.0, delta = 1e-5, noise_multiplier = 1.2 }
"""
POLICY = """
client = { name = "hospital" }
data = { source = "none.csv", labels = ["no", "yes"], declared_examples = 3000 }
privacy = { epsilon = 1.5, delta = 1e-6 }
"""
EACH = Spend(0.05, 1.2, 5)
PRIOR = [Spend(0.02, 1.0, 30)]


def figures(*arguments: str | Path) -> dict[str, Any]:
    done = fedloom("privacy", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    document: dict[str, Any] = json.loads(line)
    return document


def refused(*arguments: str | Path) -> str:
    done = fedloom("privacy", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line.removeprefix("error: ")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


@pytest.fixture
def spent(tmp_path: Path) -> Path:
    """An adapter's fedloom.json."""
    path = tmp_path / "fedloom.json"
    path.write_text(json.dumps({"run": "before", "privacy": statement(PRIOR, 1e-5, GRID).document()}))
    return path


def test_calibrate_finds_what_a_coordinator_would_choose(spent: Path) -> None:
    asked = ("calibrate", "--epsilon", "3", "--rate", "0.02", "--steps", "5", "--rounds", "4")

    alone, after = figures(*asked), figures(*asked, "--spent", spent)

    assert alone["noise_multiplier"] == calibrate(3.0, 1e-5, 0.02, 20)
    assert alone["epsilon_before"] == 0.0
    assert alone["privacy"] == statement([Spend(0.02, alone["noise_multiplier"], 5)] * 4, 1e-5, GRID).document()
    assert after["noise_multiplier"] == calibrate(3.0, 1e-5, 0.02, 20, prior=PRIOR) > alone["noise_multiplier"]
    assert after["epsilon_before"] == epsilon(PRIOR, 1e-5)
    assert after["epsilon_before"] < after["epsilon_after"] <= 3.0


def test_noise_bands_are_counted_wherever_a_cost_is_shown(run: Path) -> None:
    asked = ("--rate", "0.02", "--steps", "10", "--bands", "4")

    found = figures("calibrate", "--epsilon", "3", "--rounds", "4", *asked)
    assert found["noise_multiplier"] == calibrate(3.0, 1e-5, 0.08, 12)
    shown = figures("table", "--noise", "1", "--rounds", "8", *asked)
    assert shown["epsilon"] == [[epsilon([Spend(0.08, 1.0, 24)], 1e-5)]]
    planned = figures("plan", run, "--set", "privacy.noise_bands=2")
    assert {row["epsilon"] for row in planned["rows"] if row["rounds"] == 4} == {
        epsilon([Spend(0.1, 1.2, 12)], row["delta"], adjacency=row["adjacency"])
        for row in planned["rows"]
        if row["rounds"] == 4
    }
    said = fedloom("privacy", "plan", run, "--set", "privacy.noise_bands=2").stdout
    assert "4 rounds of 5 steps, rate 0.05" in said
    assert "over 2 bands: a round costs what 3 steps at rate 0.1 cost" in said
    wrong = ("table", "--rate", "0.3", "--steps", "10", "--bands", "4")
    assert "4 times train.sampling_rate = 0.3, which is above 1; set at most 3" in refused(*wrong)


def test_calibrate_says_on_what_terms() -> None:
    done = fedloom(
        "privacy", "calibrate", "--epsilon", "3", "--rate", "0.02", "--steps", "5", "--rounds", "4", "--delta", "1e-6"
    )

    assert done.returncode == 0, done.stderr
    sigma = calibrate(3.0, 1e-6, 0.02, 20)
    assert done.stdout.startswith(f"noise multiplier {sigma:g}\n")
    for words in (
        "one example (add or remove one)",
        "delta 1e-06",
        "20 steps at rate 0.02",
        "dp-accounting",
        "grid 0.001",
    ):
        assert words in done.stdout


def test_the_table_is_what_the_accountant_says(spent: Path) -> None:
    asked = (
        "table",
        "--rate",
        "0.05",
        "--steps",
        "5",
        "--noise",
        "1",
        "--noise",
        "2",
        "--rounds",
        "1",
        "--rounds",
        "8",
    )

    alone, after = figures(*asked), figures(*asked, "--spent", spent)

    for found, prior in ((alone, []), (after, PRIOR)):
        assert found["epsilon"] == [
            [epsilon([*prior, Spend(0.05, sigma, 5 * rounds)], 1e-5) for rounds in (1, 8)] for sigma in (1.0, 2.0)
        ]
    assert (alone["unit"], alone["adjacency"], alone["delta"]) == ("one example", "add or remove one", 1e-5)


def test_a_plan_shows_rounds_deltas_and_both_adjacencies(run: Path) -> None:
    found = figures("plan", run)

    assert found["noise_multiplier"] == 1.2
    assert {row["rounds"] for row in found["rows"]} == {1, 2, 3, 4}
    for row in found["rows"]:
        assert row["epsilon"] == epsilon([EACH] * row["rounds"], row["delta"], adjacency=row["adjacency"])
    columns = [(row["adjacency"], row["delta"]) for row in found["rows"] if row["rounds"] == 2]
    assert columns == [
        ("add or remove one", pytest.approx(1e-4)),
        ("add or remove one", 1e-5),
        ("add or remove one", 1e-6),
        ("replace one", 1e-5),
    ]
    assert found["first_unsafe_examples"] == 100_000


def test_a_plan_knows_what_a_site_can_afford(run: Path, spent: Path, tmp_path: Path) -> None:
    site = tmp_path / "client.toml"
    site.write_text(POLICY)

    found = figures("plan", run, "--policy", site, "--spent", spent)

    assert found["rounds_within_budget"] == rounds_left(PRIOR, EACH, 1.5, 1e-6, most=4)
    assert 0 < found["rounds_within_budget"] < 4, "or it would show nothing"
    shown = fedloom("privacy", "plan", run, "--policy", site).stdout
    assert f"pays for {rounds_left([], EACH, 1.5, 1e-6, most=4)} of 4 rounds" in shown
    assert "fewer than 100,000 examples" in shown


def test_a_plan_counts_what_the_sites_ledger_has_charged(run: Path, spent: Path, tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    path.write_text(POLICY)
    site = load_policy(path)
    with Ledger(ledger_folder(site), "ab" * 16, anchors=anchors_folder(site)) as ledger:
        ledger.reserve("before", 0, PRIOR[0], budget=1.5, delta=1e-6)

    charged, declared = figures("plan", run, "--policy", path), figures("plan", run, "--policy", path, "--spent", spent)

    assert charged["epsilon_before"] == epsilon(PRIOR, 1e-5)
    assert charged["rounds_within_budget"] == rounds_left(PRIOR, EACH, 1.5, 1e-6, most=4)
    assert charged["rounds_within_budget"] < rounds_left([], EACH, 1.5, 1e-6, most=4), "or it would show nothing"
    assert declared["epsilon_before"] == epsilon([*PRIOR, *PRIOR], 1e-5)
    with Ledger(ledger_folder(site), "ab" * 16, anchors=anchors_folder(site)) as ledger:
        assert len(ledger.charges()) == 1, "a plan charges nothing"


def test_a_plan_that_the_site_refuses_says_why(run: Path, tmp_path: Path) -> None:
    site = tmp_path / "client.toml"
    site.write_text(POLICY.replace("3000", "200_000"))

    line = refused("plan", run, "--policy", site)

    assert line == "this site's policy refuses run 'flu': delta 1e-05 (below 1/declared_examples = 5e-06)"


def test_a_plan_calibrates_a_run_without_a_noise_multiplier(tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text(RUN.replace(", noise_multiplier = 1.2", ""))

    found = figures("plan", run, "--set", "run.rounds=2")

    assert found["noise_multiplier"] == calibrate(5.0, 1e-5, 0.05, 10)


def test_mistakes_are_one_line(run: Path, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.json"
    stranger.write_text('{"mechanisms": [{"rate": 1}]}')
    table = ("table", "--rate", "0.05", "--steps", "5", "--noise", "1", "--rounds", "1")

    assert "sampling rate 1.5 must lie in (0, 1]" in refused("table", "--rate", "1.5", "--steps", "1")
    assert "delta 0.0 must lie in (0, 1)" in refused(*table, "--delta", "0")
    assert "is no statement of spent privacy" in refused(*table, "--spent", stranger)
    assert "cannot be read as JSON" in refused(*table, "--spent", tmp_path / "nowhere.json")
    assert "is not private" in refused("plan", run, "--set", "privacy.enabled=false")


@pytest.mark.parametrize("delta", [1e-5, 1e-6, 0.3, 0.5, 1 / 3, 1e-12, 0.9])
def test_the_first_unsafe_number_of_examples_is_the_first(delta: float) -> None:
    first = _first_unsafe(delta)

    assert delta >= 1 / first
    assert first == 1 or delta < 1 / (first - 1)
