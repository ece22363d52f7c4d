"""Write docker/locks: what images and bundles install, each wheel by its SHA-256. `make lock` after constraints.txt.

Versions are those of constraints.txt. Hashes are what the package registry says of its wheels for CPython 3.11 on
Linux, x86-64 and aarch64. torch is in no lock, nor what comes with it alone: which build a machine needs (CUDA, the
CPU, NVIDIA's own for a Jetson) depends on the machine, and so does the index it is from. `docker/wheels.py` pins the
one that it downloads.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

__all__ = ["LOCKS", "TORCH", "main", "name_of", "needed", "pinned"]

_ROOT = Path(__file__).resolve().parents[1]
LOCKS = _ROOT / "docker" / "locks"
TORCH = "torch"
_BUILD = ("hatchling", "setuptools", "wheel")
"""What builds fedloom's own wheel, and the demo data's."""

_GLIBC = (28, 31, 35, 39)
"""Minor versions of the C library: of several wheels a machine takes the one for the newest that it has."""
_HEAD = "# Made by `make lock` from constraints.txt: every wheel that an image or a bundle may install.\n"


def main() -> None:
    """Write a lock for each extra that has an image, and one for what builds fedloom."""
    versions = pinned(_ROOT / "constraints.txt")
    wanted = {"server": needed("server"), "client": needed("client"), "build": [*_BUILD]}
    locks = {}
    for lock, requirements in wanted.items():
        closure = {name_of(each["metadata"]["name"]) for each in _report("-c", "constraints.txt", *requirements)}
        locks[lock] = sorted((closure & versions.keys()) - {TORCH})
    every = sorted({name for names in locks.values() for name in names})
    hashes = _hashes([f"{name}=={versions[name]}" for name in every])
    LOCKS.mkdir(exist_ok=True)
    for lock, names in locks.items():
        lines = [" \\\n    --hash=sha256:".join([f"{name}=={versions[name]}", *hashes[name]]) for name in names]
        (LOCKS / f"{lock}.txt").write_text(_HEAD + "\n".join(lines) + "\n", encoding="utf-8")
        sys.stdout.write(f"{lock}: {len(names)} packages\n")


def needed(extra: str) -> list[str]:
    """The requirements of fedloom with one extra, as its pyproject.toml names them."""
    table = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*table["dependencies"], *table["optional-dependencies"][extra]]


def pinned(file: Path) -> dict[str, str]:
    """Version by name of a file of lines NAME==VERSION."""
    pins = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", file.read_text(encoding="utf-8"), re.M)
    return {name_of(name): version for name, version in pins}


def name_of(name: str) -> str:
    """A package's name in the one form that compares."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _hashes(pins: list[str]) -> dict[str, list[str]]:
    """The registry's hashes of every wheel that some machine would take."""
    found: dict[str, set[str]] = {}
    for arch in ("x86_64", "aarch64"):
        for newest in _GLIBC:
            # The first that fits is taken.
            tags = [f"manylinux_2_{minor}_{arch}" for minor in range(newest, 4, -1)]
            tags += [f"{old}_{arch}" for old in ("manylinux2014", "manylinux2010", "manylinux1")]
            target = ["--python-version", "3.11", "--implementation", "cp"]
            target += [word for abi in ("cp311", "abi3", "none") for word in ("--abi", abi)]
            target += [word for tag in tags for word in ("--platform", tag)]
            for each in _report("--no-deps", *target, *pins):
                link, known = each["download_info"]["url"], each["download_info"]["archive_info"]["hashes"]
                if not link.startswith("https://"):
                    sys.exit(f"{link} is not from the registry; its hash may be of a build of this machine's own")
                found.setdefault(name_of(each["metadata"]["name"]), set()).add(known["sha256"])
    return {name: sorted(hashes) for name, hashes in found.items()}


def _report(*words: str) -> list[dict[str, Any]]:
    """What pip would install, by its own report; from its index, and not from wheels that lie on this machine."""
    known = {name: value for name, value in os.environ.items() if name not in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
        command += ["--only-binary", ":all:", "--report", str(path), *words]
        subprocess.run(command, check=True, cwd=_ROOT, env=known | {"PIP_CONFIG_FILE": os.devnull})
        found: list[dict[str, Any]] = json.loads(path.read_bytes())["install"]
    return found


if __name__ == "__main__":
    main()
