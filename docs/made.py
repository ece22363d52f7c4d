"""What scripts write into pages: a whole page, or what stands in one between two marks."""

import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["between_marks", "write"]

_END = "<!-- end of what is made -->\n"


def between_marks(page: Path, script: str, content: str) -> str:
    """The page with `content` between its marks; what stands around them is left as it is.

    Raises:
        SystemExit: The page has lost its marks.
    """
    mark = f"<!-- made by docs/{script}.py -->\n"
    before, begin, rest = page.read_text(encoding="utf-8").partition(mark)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        sys.exit(f"{page.name} lacks the lines {mark.strip()} and {_END.strip()}; put them back")
    return before + begin + content + end + after


def write(script: str, pages: Mapping[Path, str], check: bool | None = None) -> None:
    """Write the pages, or only compare them.

    Args:
        script: What makes them.
        pages: What they say.
        check: Only compare them. None reads the command line, where nothing but `--check` may stand.

    Raises:
        SystemExit: A page is not what would be written, or the command line has something else.
    """
    if check is None:
        if sys.argv[1:] not in ([], ["--check"]):
            sys.exit(f"unknown arguments {' '.join(sys.argv[1:])}; only --check is allowed")
        check = bool(sys.argv[1:])
    for page, text in pages.items():
        if not check:
            page.write_text(text, encoding="utf-8")
        elif not page.is_file() or page.read_text(encoding="utf-8") != text:
            sys.exit(f"{page.name} is stale; run `python -m docs.{script}`")
