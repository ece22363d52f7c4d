"""No page shows what was to be filled in later. Built pages are looked at in test_site.py."""

from pathlib import Path

import pytest

from tests.docs.blocks import DOCS
from tests.docs.placeholders import empty_figures, placeholders

ROOT = DOCS.parent
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("examples/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_left_to_be_filled_in(page: Path) -> None:
    text = page.read_text(encoding="utf-8")

    assert placeholders(text) == []
    assert list(empty_figures(text)) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("git clone URL-OF-THIS-REPOSITORY fedloom", ["URL-OF-THIS-REPOSITORY"]),
        ("| an empty round | @GRPC@ | @FLOWER@ |", ["@GRPC@", "@FLOWER@"]),
        ("| server | SERVER_SIZE | SERVER_OWN |", ["SERVER_SIZE", "SERVER_OWN"]),
        ("It takes TBD minutes; TODO: measure", ["TBD", "TODO"]),
        ("see <your server>", ["<your server>"]),
        ("fedloom export RUN --out FOLDER, as CC-BY-SA, from ORG/NAME with FEDLOOM_CACHE", []),
    ],
)
def test_placeholders_are_seen(text: str, found: list[str]) -> None:
    assert placeholders(text) == found


def test_empty_cells_are_seen_where_figures_belong() -> None:
    table = "| what | size | note |\n|---|---|---|\n| a | 12 MB | |\n| b | 3 MB | x |\n| c | | |\n"

    assert list(empty_figures(table)) == ["c |  | "]
