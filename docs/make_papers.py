"""Write the tables of docs/papers.md from docstrings; `--check` exits 1 when the page is not what would be written."""

import re
from importlib import import_module
from inspect import getdoc
from pathlib import Path

from docs.made import between_marks, write
from fedloom.core.registry import Entry, entries, load, noun

TARGET = Path(__file__).with_name("papers.md")
ROOT = TARGET.parent.parent

_GROUPS = ("strategies", "adapters", "optimizers", "partitioners")
_CITED = re.compile(r"\b(19|20)\d\d\b")
_ARXIV = re.compile(r"arXiv[ :](\d{4}\.\d{4,5})")


def main() -> None:
    """Write the page, or with `--check` only compare it."""
    tables = "\n".join(_table(group) for group in _GROUPS)
    write("make_papers", {TARGET: between_marks(TARGET, "make_papers", tables)})


def _table(group: str) -> str:
    kind = noun(group)
    lines = [f"\n| paper | {kind} | what it does | tested in |", "|---|---|---|---|"]
    for name, entry in entries(group).items():
        module = entry.value.partition(":")[0]
        paper = (import_module(module).__doc__ or "").strip().partition("\n")[0]
        if entry.ours and _CITED.search(paper):
            summary = (getdoc(load(group, name)) or "").partition("\n")[0]
            lines.append(f"| {_linked(paper)} | `{name}` | {summary} | {_tests(entry)} |")
    return "\n".join(lines) + "\n"


def _linked(paper: str) -> str:
    return _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", paper.rstrip("."))


def _tests(entry: Entry) -> str:
    """Test files that import the component's module, those named after its folder or itself first."""
    module = entry.value.partition(":")[0]
    last = module.rpartition(".")[2]
    found = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(rf"\b{re.escape(module)}\b", path.read_text(encoding="utf-8"))
    ]
    near = [path for path in found if any(part in path for part in (last, module.split(".")[-2]))]
    return ", ".join(f"`{path}`" for path in (near or found)[:2])


if __name__ == "__main__":
    main()
