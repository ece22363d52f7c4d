"""Gather everything a site without internet needs to install fedloom: wheels, pinned by hash. `make wheels` runs it.

Every wheel must be one of docker/locks, by its SHA-256, except fedloom's own, torch and what comes with torch alone:
which build of torch a machine needs depends on the machine. Those are named at the end.

    python deploy/bundle.py dist/server --extra server
    python deploy/bundle.py dist/jetson --extra client --platform manylinux_2_28_aarch64

The folder has wheels/, requirements.txt (each wheel's version and SHA-256), SHA256SUMS over all of it, and INSTALL.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

__all__ = ["check", "digest", "gather", "main", "requirements", "write_manifest"]

ROOT = Path(__file__).resolve().parents[1]

_INSTALL = """\
sha256sum --check SHA256SUMS
python3.11 -m venv /usr/local/lib/fedloom
/usr/local/lib/fedloom/bin/pip install --no-index --find-links wheels --require-hashes -r requirements.txt
"""


def main() -> None:
    """Read the command line and make the bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to; must not hold wheels yet")
    parser.add_argument("--extra", default="client", help="what the machine is for: client or server")
    parser.add_argument("--platform", help="the machine's platform tag, when it is not like this one")
    asked = parser.parse_args()
    wheels = asked.folder / "wheels"
    if wheels.is_dir() and any(wheels.iterdir()):
        sys.exit(f"{wheels} has files already; a bundle is made whole, so give another folder or remove it")
    gather(wheels, asked.extra, asked.platform)
    unlocked = check(wheels)
    write_manifest(asked.folder, asked.extra)
    sys.stdout.write(f"{asked.folder}: {len(list(wheels.iterdir()))} wheels; copy it over and follow INSTALL\n")
    if unlocked:
        sys.stdout.write(f"not in docker/locks, so taken as the index gave them: {', '.join(unlocked)}\n")


def gather(wheels: Path, extra: str, platform: str | None) -> None:
    """Build fedloom's own wheel, and download those it needs in the versions that constraints.txt has."""
    wheels.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    # By the hatchling that is installed here: in an environment of its own pip would take the newest of an index.
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(ROOT)]
    subprocess.run(build, check=True)
    (mine,) = wheels.glob("fedloom-*.whl")
    command = [*pip, "download", "--quiet", "--dest", str(wheels), "--only-binary", ":all:"]
    command += ["--constraint", str(ROOT / "constraints.txt"), f"{mine}[{extra}]"]
    subprocess.run(command + (["--platform", platform] if platform else []), check=True)


def check(wheels: Path, locks: Path = ROOT / "docker" / "locks") -> list[str]:
    """Stop if a wheel is not what the locks say of it.

    Returns:
        Names of the wheels that no lock has; fedloom's own is not among them.
    """
    text = "".join(each.read_text(encoding="utf-8") for each in sorted(locks.glob("*.txt")))
    known: dict[str, set[str]] = {}
    for name, hashes in re.findall(r"^(\S+)==\S+((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.M):
        known.setdefault(_folded(name), set()).update(re.findall("[0-9a-f]{64}", hashes))
    unlocked = []
    for wheel in sorted(wheels.glob("*.whl")):
        name = wheel.name.partition("-")[0]
        if _folded(name) not in known:
            unlocked += [] if name == "fedloom" else [name]
        elif digest(wheel) not in known[_folded(name)]:
            sys.exit(
                f"{wheel.name} has SHA-256 {digest(wheel)}, which is none that docker/locks has for {name}; the index "
                "gave another file than the registry's, or `make lock` was not run after constraints.txt changed"
            )
    return unlocked


def _folded(name: str) -> str:
    """A package's name in the one form that compares."""
    return re.sub(r"[-_.]+", "-", name).lower()


def write_manifest(folder: Path, extra: str) -> None:
    """Write requirements.txt, INSTALL and SHA256SUMS beside the wheels."""
    (folder / "requirements.txt").write_text(requirements(folder / "wheels", extra), encoding="utf-8")
    (folder / "INSTALL").write_text(_INSTALL, encoding="utf-8")
    files = [each for each in sorted(folder.rglob("*")) if each.is_file() and each.name != "SHA256SUMS"]
    sums = "".join(f"{digest(each)}  {each.relative_to(folder)}\n" for each in files)
    (folder / "SHA256SUMS").write_text(sums, encoding="utf-8")


def requirements(wheels: Path, extra: str) -> str:
    """A line for each wheel; pip installs no other, and none whose content has changed."""
    own = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    lines = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        wanted = f"{name}[{extra}]" if name == own else name
        lines.append(f"{wanted}=={version} --hash=sha256:{digest(wheel)}\n")
    return "".join(lines)


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
