"""Write the table of mutations into docs/privacy.md; `--check` exits 1 when it is not what would be written."""

import sys
import tomllib
from pathlib import Path

__all__ = ["main", "page"]

TARGET = Path(__file__).with_name("privacy.md")
SOURCE = TARGET.parents[1] / "tests" / "mutations" / "mutations.toml"

_START, _END = "<!-- mutations: made by docs/make_mutations.py -->\n", "<!-- end of mutations -->"


def page() -> str:
    """The page with the table as the list of mutations gives it."""
    text = TARGET.read_text(encoding="utf-8")
    before, start, rest = text.partition(_START)
    _, end, after = rest.partition(_END)
    if not (start and end):
        sys.exit(f"{TARGET.name} has lost its marks {_START.strip()} and {_END}; put them back")
    return f"{before}{_START}\n{_table()}\n{_END}{after}"


def _table() -> str:
    lines = ["| mistake | in | caught by |", "|---|---|---|"]
    for each in tomllib.loads(SOURCE.read_text(encoding="utf-8"))["mutation"]:
        tests = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in each["tests"])
        name = f"**{each['name']}**" if each.get("quick", False) else each["name"]
        lines.append(f"| {name}: {each['bug']} | `{Path(each['file']).name}` | {tests} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page, or with `--check` only compare it."""
    text = page()
    if sys.argv[1:] == ["--check"]:
        if TARGET.read_text(encoding="utf-8") != text:
            sys.exit(f"{TARGET.name} is stale; run `python docs/make_mutations.py`")
    elif sys.argv[1:]:
        sys.exit(f"unknown arguments {' '.join(sys.argv[1:])}; only --check is allowed")
    else:
        TARGET.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
