"""The site: every page is built and linked without a warning, and nothing on it comes from elsewhere."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import DOCS
from tests.docs.placeholders import placeholders

ROOT = DOCS.parent
LOADED = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)")


def build(target: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = build(target)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_every_page_is_built_and_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text()

    for path in sorted(DOCS.rglob("*.md")):
        page = path.relative_to(DOCS).with_suffix(".html").as_posix()
        assert (site / page).is_file()
        assert f'href="{page}"' in home, f"{page} is missing from the navigation of mkdocs.yml"


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    # A page's own address, which nobody has yet, is a link and not something loaded.
    found = {address for text in pages.values() for address in LOADED.findall(text)}

    assert len(pages) > 20
    assert not found
    styles = [path.read_text() for path in (site / "assets" / "stylesheets").glob("*.css")]
    assert styles
    assert not [style for style in styles if re.search(r"url\((?:[\"']?)(?:https?:)?//", style)]


def test_no_page_shows_what_was_to_be_filled_in(site: Path) -> None:
    words = {path: html.unescape(re.sub(r"<[^>]*>", "", path.read_text())) for path in site.rglob("*.html")}

    assert {path.name: found for path, text in words.items() if (found := placeholders(text))} == {}


@pytest.mark.parametrize(
    ("markup", "hit"),
    [
        ('<link rel="stylesheet" href="https://fonts.example/x.css">', True),
        ("<script src=//cdn.example/x.js></script>", True),
        ('<a href="https://example.org">x</a>', False),
        ('<script src="assets/x.js"></script>', False),
    ],
)
def test_what_is_loaded_is_seen(markup: str, hit: bool) -> None:
    assert bool(LOADED.search(markup)) is hit


def test_search_has_its_index_beside_the_pages(site: Path) -> None:
    index = (site / "search" / "search_index.json").read_text()

    assert "quickstart.html" in index
    assert "min_noise_multiplier" in index


def test_marks_for_tests_are_not_shown(site: Path) -> None:
    page = (site / "tutorial-strategy.html").read_text()

    assert 'class="highlight"' in page
    assert "file=headfirst" not in page
    assert "not-run" not in (site / "quickstart.html").read_text()


@pytest.mark.parametrize(
    ("text", "nav"),
    [("[nowhere](nowhere.md)", ["index.md"]), ("# Here", ["index.md", "nowhere.md"])],
    ids=["link", "navigation"],
)
def test_a_page_that_is_missing_fails_the_build(tmp_path: Path, text: str, nav: list[str]) -> None:
    page = tmp_path / "docs" / "index.md"
    page.parent.mkdir()
    page.write_text(f"{text}\n")
    settings = (ROOT / "mkdocs.yml").read_text().partition("nav:")[0].replace("docs/site.py", str(DOCS / "site.py"))
    (tmp_path / "mkdocs.yml").write_text(settings + "nav:\n" + "".join(f"  - Page: {each}\n" for each in nav))
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)

    assert done.returncode != 0
    assert "nowhere.md" in done.stderr
