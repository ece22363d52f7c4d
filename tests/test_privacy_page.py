"""docs/privacy.md says nothing that is not there: its tests and commands exist."""

import re
from pathlib import Path

import typer

from fedloom.cli.main import app

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")


def test_every_test_it_names_exists() -> None:
    claims = PAGE.partition("## Each claim and the test for it")[2].partition("\n## ")[0]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", claims)

    assert len(named) > 20
    for file, function in named:
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{function}"


def test_every_command_it_names_exists() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # it is a group
    known = {f"fedloom {name}" for name in commands}
    known |= {f"fedloom {name} {sub}" for name, group in commands.items() for sub in getattr(group, "commands", ())}
    blocks = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.S))

    lines = [line.split() for line in blocks.splitlines() if line.startswith("fedloom ")]

    assert len(lines) >= 6
    for line in lines:
        names = {" ".join(line[:2]), " ".join(line[:3])}
        assert names & known, " ".join(line)
