"""Fill docker/wheels, from the repository's root: what the images install, so that a build touches no network.

By this machine's pip and its configuration, so the Python must be of the image's version and platform. What the locks
have is taken with the locks' hashes. torch, and what comes with it alone, is the build that this machine is given; its
hashes are written to torch.txt beside the wheels, and an image takes no other.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from docker.lock import LOCKS, TORCH, name_of, pinned
from fedloom.client.assets.fetch import ASSETS

__all__ = ["main"]

_FOLDER = Path(__file__).parent / "wheels"
_ASSETS = ("minilm-l3-mean", "sentiment")


def main() -> None:
    """Download everything that is not there yet."""
    for lock in ("server", "client", "build"):
        _download("--require-hashes", "--no-deps", "-r", str(LOCKS / f"{lock}.txt"))
    _download("-c", "constraints.txt", "--only-binary", ":all:", TORCH)
    (_FOLDER / "torch.txt").write_text("".join(_torch()), encoding="utf-8")
    for asset in (ASSETS[name] for name in _ASSETS):
        _download("--no-deps", *asset.arguments, asset.requirement)


def _download(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(_FOLDER), *arguments]
    subprocess.run(command, check=True)


def _torch() -> list[str]:
    """A line for torch, and for everything it needs that no lock has, with the hash of what was downloaded."""
    locked = pinned(LOCKS / "client.txt")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--no-index"]
        command += ["--find-links", str(_FOLDER), "-c", "constraints.txt", "--report", str(path), TORCH]
        subprocess.run(command, check=True)
        found = json.loads(path.read_bytes())["install"]
    return [
        f"{each['metadata']['name']}=={each['metadata']['version']} "
        f"--hash=sha256:{each['download_info']['archive_info']['hashes']['sha256']}\n"
        for each in found
        if name_of(each["metadata"]["name"]) not in locked
    ]


if __name__ == "__main__":
    main()
