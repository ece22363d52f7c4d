"""What was to be filled in later, found in a page's text."""

import re
from collections.abc import Iterator

__all__ = ["empty_figures", "placeholders"]

_MARK = re.compile(
    r"\b(?:TODO|TBD|FIXME|XXX+)\b"
    r"|@[A-Z][A-Z_]+@"  # for a script that never ran
    r"|\b(?:URL|NAME|PATH|LINK|ADDRESS)-(?:OF|TO|OR|HERE)\b[A-Z-]*"
    r"|\b[A-Z]+_(?:SIZE|OWN|TIME|SECONDS|BYTES|MIB|MB|SHARE|COUNT)\b"
    r"|<(?:your|insert|fill|url|link|size|number|date|to be)\b[^>\n]*>"
    r"|\{\{[^}\n]*\}\}|\?\?\?"
    r"|\blorem ipsum\b"
)
_FIGURE = re.compile(r"^[~≈<>±*]*\d")


def placeholders(text: str) -> list[str]:
    """Every mark of something unfilled, as it stands there."""
    return [found[0] for found in _MARK.finditer(text)]


def empty_figures(markdown: str) -> Iterator[str]:
    """Rows of tables with an empty cell in a column whose other cells are mostly figures."""
    for table in re.findall(r"(?:^\|.*\|[ ]*\n)+", markdown + "\n", re.M):
        rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
        for column in range(1, len(rows[0])):
            cells = [(row[column], row) for row in rows[2:] if column < len(row)]
            figures = sum(bool(_FIGURE.match(cell)) for cell, _ in cells)
            if 2 * figures > len(cells):
                yield from (" | ".join(row) for cell, row in cells if not cell)
