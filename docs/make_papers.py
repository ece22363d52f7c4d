"""Write the tables of docs/papers.md from docstrings; `--check` exits 1 when the page is not what would be written."""

import re
import sys
from importlib import import_module
from inspect import getdoc
from pathlib import Path

from fedloom.core.registry import Entry, entries, load, noun

__all__ = ["main", "page"]

TARGET = Path(__file__).with_name("papers.md")
ROOT = TARGET.parent.parent

_BEGIN, _END = "<!-- made by docs/make_papers.py -->\n", "<!-- end of what is made -->\n"
_GROUPS = ("strategies", "adapters", "optimizers", "partitioners")
_CITED = re.compile(r"\b(19|20)\d\d\b")
_ARXIV = re.compile(r"arXiv[ :](\d{4}\.\d{4,5})")


def page(text: str) -> str:
    """The page with its tables made anew; what stands around them is left as it is.

    Raises:
        SystemExit: The page has lost its marks.
    """
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        sys.exit(f"{TARGET.name} lacks the lines {_BEGIN.strip()} and {_END.strip()} around its tables; put them back")
    return before + begin + "\n".join(_table(group) for group in _GROUPS) + end + after


def main() -> None:
    """Write the page, or with `--check` only compare it."""
    old = TARGET.read_text(encoding="utf-8")
    new = page(old)
    if sys.argv[1:] == ["--check"]:
        if old != new:
            sys.exit(f"{TARGET.name} is stale; run `python docs/make_papers.py`")
    elif sys.argv[1:]:
        sys.exit(f"unknown arguments {' '.join(sys.argv[1:])}; only --check is allowed")
    else:
        TARGET.write_text(new, encoding="utf-8")


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
