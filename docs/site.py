"""What mkdocs is told beyond mkdocs.yml: the pages of the site are the files that a reader of the repository reads."""

import re
from pathlib import Path
from typing import Any

__all__ = ["on_config", "on_page_markdown"]

DOCS = Path(__file__).parent

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)[^)]*\)")
_FENCE = re.compile(r"^(```\w+)[ ]+.+$", re.M)


def on_config(config: Any) -> Any:
    """List the decisions."""
    decisions = sorted((DOCS / "decisions").glob("*.md"))
    listed = [{_title(path): f"decisions/{path.name}"} for path in decisions]
    config["nav"] = [{**each, "Decisions": listed} if "Decisions" in each else each for each in config["nav"]]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name files outside of docs/ instead of linking to them, and cut marks for the tests off code blocks."""
    return _FENCE.sub(r"\1", _OUTSIDE.sub(r"\1 (`\2` in the repository)", markdown))


def _title(path: Path) -> str:
    """A page's own heading."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
