"""The rooms of the tree: small folders, a map of them, and a README that lists what is installed."""

import ast
import re
from pathlib import Path

import pytest

from fedloom.core.registry import GROUPS, entries
from tests.test_meta import MODULES, ROOT

ROOMS = sorted({str(Path(path).parent) for path in MODULES})
MOST_MODULES = 14


@pytest.mark.parametrize("room", ROOMS)
def test_a_folder_is_small_enough_to_be_read(room: str) -> None:
    modules = [path for path in MODULES if str(Path(path).parent) == room and not path.endswith("__init__.py")]

    assert len(modules) <= MOST_MODULES, "split it into folders whose names are terms of the field"


def test_the_map_has_every_room_with_the_first_line_of_its_docstring() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in MODULES:
        _, _, inside = str(Path(path).parent).partition("/fedloom/")
        if path.endswith("__init__.py") and "/" in inside:
            line = (ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or "").partition("\n")[0]
            assert f"| `{inside}` | {line} |\n" in page, f"write docs/architecture.md anew for {inside}"


def test_the_readme_lists_the_components_that_come_with_fedloom() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for group in GROUPS:
        (row,) = re.findall(rf"^\| {group} \| (.*?) \|", text, re.M)

        assert set(re.findall(r"`([^`]+)`", row)) == {name for name, entry in entries(group).items() if entry.ours}
