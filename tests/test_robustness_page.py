"""The table of docs/robustness.md says what benchmarks/attacks.json holds."""

import json
import re
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parents[1]


def test_the_table_is_the_benchmarks() -> None:
    runs = json.loads((ROOT / "benchmarks" / "attacks.json").read_text(encoding="utf-8"))["runs"]
    page = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    attacks = list(dict.fromkeys(run["attack"] for run in runs))
    rules = list(dict.fromkeys(run["rule"] for run in runs))
    (body,) = re.findall(rf"^\| rule \| {re.escape(' | '.join(attacks))} \|\n\|[-| ]+\|\n((?:\|.*\n)+)", page, re.M)
    shown = {
        cells[0]: cells[1:] for line in body.splitlines() if (cells := [c.strip() for c in line.strip("|").split("|")])
    }

    for rule in rules:
        for attack, cell in zip(attacks, shown[f"`{rule}`"], strict=True):
            scores = [run["accuracy"] for run in runs if (run["rule"], run["attack"]) == (rule, attack)]
            assert cell == f"{100 * mean(scores):.1f}", f"{rule} under {attack}"
    assert len(shown) == len(rules)
