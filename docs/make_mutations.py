"""Write the tables of mutations into docs; `--check` exits 1 when one is not what would be written."""

import sys
import tomllib
from pathlib import Path

__all__ = ["main", "page"]

DOCS = Path(__file__).parent
LISTS = DOCS.parent / "tests" / "mutations"
PAGES = {DOCS / "privacy.md": LISTS / "mutations.toml", DOCS / "track-record.md": LISTS / "reliability.toml"}

_START, _END = "<!-- mutations: made by docs/make_mutations.py -->\n", "<!-- end of mutations -->"


def page(target: Path) -> str:
    """The page with the table as its list of mutations gives it."""
    text = target.read_text(encoding="utf-8")
    before, start, rest = text.partition(_START)
    _, end, after = rest.partition(_END)
    if not (start and end):
        sys.exit(f"{target.name} has lost its marks {_START.strip()} and {_END}; put them back")
    return f"{before}{_START}\n{_table(PAGES[target])}\n{_END}{after}"


def _table(source: Path) -> str:
    lines = ["| mistake | in | caught by |", "|---|---|---|"]
    for each in tomllib.loads(source.read_text(encoding="utf-8"))["mutation"]:
        tests = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in each["tests"])
        name = f"**{each['name']}**" if each.get("quick", False) else each["name"]
        lines.append(f"| {name}: {each['bug']} | `{each['symbol'].partition(':')[2]}` | {tests} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the pages, or with `--check` only compare them."""
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(f"unknown arguments {' '.join(sys.argv[1:])}; only --check is allowed")
    for target in PAGES:
        text = page(target)
        if not sys.argv[1:]:
            target.write_text(text, encoding="utf-8")
        elif target.read_text(encoding="utf-8") != text:
            sys.exit(f"{target.name} is stale; run `python docs/make_mutations.py`")


if __name__ == "__main__":
    main()
