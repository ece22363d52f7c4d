"""The gallery's table says what runs of the run files in examples/ wrote, and nothing else."""

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from docs import make_gallery
from fedloom.core.config.run import load_run

PAGE = "# G\n<!-- made by docs/make_gallery.py -->\n<!-- end of what is made -->\nafter\n"
RUN = """
[run]
name = "tags"
[model]
base = "minilm-l3"
task = "multi-label"
[privacy]
delta = 1e-5
[data]
source = "complaints"
clients = 4
"""
SUMMARY = {
    "accuracy_start": 0.5,
    "accuracy": 0.9,
    "loss_start": 0.7,
    "loss": 0.2,
    "metrics_start": {"f1_micro": 0.25},
    "metrics": {"f1_micro": 0.875},
    "classes": [],
    "held_out_examples": 1200,
    "epsilon": {"client-0": 5.5, "client-1": 5.98},
    "bytes_up": 8_000_000,
    "bytes_down": 6_000_000,
    "seconds": 100.0,
    "cpu_seconds": 150.0,
    "peak_bytes": 900 << 20,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder of the only recipe; the page has no table yet."""
    (tmp_path / "gallery.md").write_text(PAGE)
    (tmp_path / "tags.toml").write_text(RUN)
    ran = tmp_path / "runs"
    ran.mkdir()
    (ran / "run.toml").write_text(RUN.replace("[model]", "rounds = 10\n[model]"))
    (ran / "summary.json").write_text(json.dumps(SUMMARY))
    monkeypatch.setattr(make_gallery, "TARGET", tmp_path / "gallery.md")
    monkeypatch.setattr(make_gallery, "EXAMPLES", tmp_path)
    monkeypatch.setattr(make_gallery, "SOURCE", tmp_path / "recipes.json")
    monkeypatch.setattr(make_gallery, "JOBS", {"tags": "Tags of letters"})
    return ran


def make(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["make_gallery", *arguments])
    make_gallery.main()


def test_the_table_has_what_a_run_folder_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(monkeypatch, str(folder))
    make(monkeypatch, "--check")

    text = make_gallery.TARGET.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| Tags of letters"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:6] == [
        "[examples/tags.toml](../examples/tags.toml)",
        "`multi-label`",
        "`minilm-l3`",
        "`complaints`, 4",
        "5.98, 1e-05",
    ]
    assert cells[6:10] == ["–", "25.0", "**87.5**", "% F1 of tags, 1,200 held-out rows"]
    assert cells[10:] == ["2.00", "1.50", "2.5", "900 MiB"]
    assert text.endswith("after\n")


def test_figures_of_other_settings_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = folder / "run.toml"
    ran.write_text(ran.read_text().replace("clients = 4", "clients = 2"))

    with pytest.raises(SystemExit, match=r"another data\.clients than examples/tags\.toml"):
        make(monkeypatch, str(folder))

    assert not make_gallery.SOURCE.exists()


def test_a_run_file_that_changed_since_is_stale_but_a_comment_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = folder.parent / "tags.toml"
    make(monkeypatch, str(folder))

    example.write_text(f"# words\n{RUN}")
    make(monkeypatch, "--check")

    example.write_text(RUN.replace("1e-5", "1e-6"))
    with pytest.raises(SystemExit, match="not what its figures were measured with"):
        make(monkeypatch, "--check")


def test_a_table_that_somebody_edited_is_stale(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(monkeypatch, str(folder))
    page = make_gallery.TARGET
    page.write_text(page.read_text().replace("87.5", "97.5"))

    with pytest.raises(SystemExit, match="stale"):
        make(monkeypatch, "--check")


def test_a_recipe_without_figures_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(make_gallery.JOBS, "more", "More")

    with pytest.raises(SystemExit, match="no figures of more"):
        make(monkeypatch, str(folder))


@pytest.mark.parametrize("name", make_gallery.JOBS)
def test_every_recipe_is_private_and_learned_something(name: str) -> None:
    known: dict[str, Any] = json.loads(make_gallery.SOURCE.read_text(encoding="utf-8"))
    config = load_run(make_gallery.EXAMPLES / f"{name}.toml")
    tables = tomllib.loads((make_gallery.EXAMPLES / f"{name}.toml").read_text(encoding="utf-8"))

    assert known[name]["settings"] == make_gallery.settings(tables)
    assert 0 < known[name]["epsilon"] <= config.privacy.epsilon <= 8
    assert known[name]["end"]["loss"] < known[name]["start"]["loss"]
