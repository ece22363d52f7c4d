"""docs/security.md says nothing that is not there: its tests exist, and its roles are those in the code."""

import re
from pathlib import Path

import pytest

from fedloom.core.security.subject import MemberRole
from fedloom.server.auth.gate import ALLOWED

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def test_every_test_it_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)

    assert len(named) > 15
    for file, function in named:
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{function}"


def test_every_defence_names_a_test() -> None:
    table = PAGE.partition("## Attacks, defences, tests")[2].partition("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| attack")]
    rows = [line.strip("|").split("|") for line in lines]

    assert len(rows) > 30
    assert all("`tests/" in row[-1] or "the same, `" in row[-1] or "the same watch" in row[1] for row in rows)


def test_its_table_of_roles_is_that_of_the_code() -> None:
    table = PAGE.partition("## Who may do what")[2].partition("\n## ")[0]
    listed = {
        name: set(re.findall(r"`(\w+)`", methods))
        for name, methods in re.findall(r"^\| (\w+) \| (.+) \|$", table, re.M)
    }

    assert {role: listed[role] for role in MemberRole} == {
        role: {method for method, roles in ALLOWED.items() if role in roles} for role in MemberRole
    }


@pytest.mark.parametrize("heading", ["Attacks on privacy", "What trials found"])
def test_every_row_of_the_track_record_names_tests_that_exist(heading: str) -> None:
    page = (ROOT / "docs" / "track-record.md").read_text(encoding="utf-8")
    rows = [each for each in page.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines() if "| " in each]

    assert len(rows) > 12
    for row in rows[1:]:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row)
        assert named, row
        for file, function in named:
            assert (f"def {function}(" if function else "def test_") in (ROOT / file).read_text(encoding="utf-8"), file
