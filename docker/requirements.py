"""Print what an extra of fedloom needs, one requirement a line: `python requirements.py server|client`."""

import sys
import tomllib
from pathlib import Path

__all__ = ["needed"]


def needed(extra: str, project: Path = Path("pyproject.toml")) -> list[str]:
    """The requirements of fedloom with one extra, as its pyproject.toml names them."""
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    return [*table["dependencies"], *table["optional-dependencies"][extra]]


if __name__ == "__main__":
    print(*needed(sys.argv[1]), sep="\n")
