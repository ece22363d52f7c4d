"""The locks of images and bundles: they agree with constraints.txt, are whole, and are what gets installed."""

import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from docker.lock import LOCKS, TORCH, name_of, needed, pinned

ROOT = Path(__file__).parents[2]
VERSIONS = pinned(ROOT / "constraints.txt")
NAMES = ["server", "client", "build"]


def closure(names: set[str], skipped: str) -> set[str]:
    """Names of all that is needed here, by what is installed; what only `skipped` brings is left out."""
    seen: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        if name in seen or name == skipped:
            continue
        seen.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        for each in map(Requirement, lines):
            if each.marker is None or each.marker.evaluate({"extra": ""}):
                waiting.add(name_of(each.name))
    return seen


@pytest.mark.parametrize("lock", NAMES)
def test_a_lock_has_the_versions_of_constraints(lock: str) -> None:
    pins = pinned(LOCKS / f"{lock}.txt")

    assert {name: VERSIONS.get(name) for name in pins} == pins, "run `make lock`"


@pytest.mark.parametrize("extra", ["server", "client"])
def test_a_lock_has_everything_but_torch(extra: str) -> None:
    pins = pinned(LOCKS / f"{extra}.txt")

    assert TORCH not in pins
    assert closure({name_of(Requirement(each).name) for each in needed(extra)}, TORCH) <= pins.keys(), "run `make lock`"


@pytest.mark.parametrize("lock", NAMES)
def test_every_pin_has_a_hash_and_nothing_else_is_in_a_lock(lock: str) -> None:
    text = (LOCKS / f"{lock}.txt").read_text(encoding="utf-8")
    head, _, rest = text.partition("\n")

    assert head.startswith("# Made by `make lock`")
    assert re.fullmatch(r"(\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\n)+", rest)
    assert rest.count("==") == len(pinned(LOCKS / f"{lock}.txt"))


def test_an_image_installs_by_hashes_all_but_torch() -> None:
    """Every call of pip in the steps of a build."""
    steps = (ROOT / "docker" / "install.sh").read_text(encoding="utf-8")
    lines = [line.strip() for line in steps.splitlines() if re.search(r"^\s+(install|locked|python3 -m pip) ", line)]

    free = [line for line in lines if not line.startswith("locked ") and "--require-hashes" not in line]
    assert 'locked() { install --require-hashes --no-deps -r "$1"; }' in steps.splitlines()
    assert free == [
        'install -c constraints.txt --index-url "$2" --no-deps torch',
        "install -c constraints.txt torch",
        'python3 -m pip --python "$target/bin/python" check',
        "install --no-deps --no-index /built/fedloom-*.whl",
    ]
