"""Write the tables of mutations into docs; `--check` exits 1 when one is not what would be written."""

import tomllib
from pathlib import Path

from docs.made import between_marks, write

DOCS = Path(__file__).parent
LISTS = DOCS.parent / "tests" / "mutations"
PAGES = {DOCS / "privacy.md": LISTS / "mutations.toml", DOCS / "track-record.md": LISTS / "reliability.toml"}


def _table(source: Path) -> str:
    lines = ["| mistake | in | caught by |", "|---|---|---|"]
    for each in tomllib.loads(source.read_text(encoding="utf-8"))["mutation"]:
        tests = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in each["tests"])
        name = f"**{each['name']}**" if each.get("quick", False) else each["name"]
        lines.append(f"| {name}: {each['bug']} | `{each['symbol'].partition(':')[2]}` | {tests} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the pages, or with `--check` only compare them."""
    made = {page: between_marks(page, "make_mutations", f"\n{_table(source)}\n") for page, source in PAGES.items()}
    write("make_mutations", made)


if __name__ == "__main__":
    main()
