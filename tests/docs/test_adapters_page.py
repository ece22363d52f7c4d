"""The table of docs/adapters.md has every kind that comes with fedloom, and says what holds for it."""

import re
import tomllib
from pathlib import Path

import pytest

from fedloom.client.adapters.attach import adapter_of
from fedloom.client.assets.fetch import fetch
from fedloom.client.models.load import load_model
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.registry import entries

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| `.*\|$", PAGE, re.M)]


def section(cell: str) -> AdapterSection:
    kind, *options = re.findall(r"`([^`]+)`", cell)
    return AdapterSection.model_validate({"kind": kind} | tomllib.loads("\n".join(options)))


def test_every_kind_is_in_the_table() -> None:
    assert {section(cells[0]).kind for cells in ROWS} == {n for n, each in entries("adapters").items() if each.ours}


@pytest.mark.parametrize("cells", ROWS, ids=[cells[0] for cells in ROWS])
def test_a_row_says_what_the_kind_says(cells: list[str]) -> None:
    adapter = section(cells[0])
    traits = adapter_of(adapter).traits
    base = ModelSection(base=str(fetch("minilm-l6")), labels=("no", "yes"), max_length=16)

    schema = load_model(base, adapter).schema

    own = sum(spec.size for spec in schema.tensors if spec.role != "head")
    assert cells[2] == f"{own:,}"
    assert cells[3] == ("exact" if traits.exact_average else "inexact")
    assert cells[4] == {"peft": "PEFT", "merged": "merged", "fedloom": "folder"}[traits.result]
    assert traits.private
    assert schema.size - own == 770
