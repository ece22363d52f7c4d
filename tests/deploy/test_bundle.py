"""The offline bundle's manifest, with a real pip: what it lists is installed, and what was changed is not."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle() -> Any:
    """deploy/bundle.py as a module."""
    found = importlib.util.spec_from_file_location("bundle", ROOT / "deploy" / "bundle.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def wheel(folder: Path, name: str, needs: str = "") -> Path:
    """A wheel with one module."""
    path, info = folder / f"{name}-1.2-py3-none-any.whl", f"{name}-1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"NAME = '{name}'\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n{needs}")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def folder(tmp_path: Path, bundle: Any) -> Path:
    wheels = tmp_path / "bundle" / "wheels"
    wheels.mkdir(parents=True)
    wheel(wheels, "fedloom", "Provides-Extra: server\nRequires-Dist: needed>=1; extra == 'server'\n")
    wheel(wheels, "needed")
    bundle.write_manifest(tmp_path / "bundle", "server")
    return tmp_path / "bundle"


def install(folder: Path, target: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "install", "--no-index"]
    command += ["--find-links", "wheels", "--require-hashes", "-r", "requirements.txt", "--target", str(target)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=240)


def sums(folder: Path) -> int:
    command = ["sha256sum", "--quiet", "--check", "SHA256SUMS"]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=60).returncode


def test_what_is_listed_is_installed_without_an_index(folder: Path, tmp_path: Path) -> None:
    assert sums(folder) == 0

    done = install(folder, tmp_path / "site")

    assert done.returncode == 0, done.stderr
    assert {"fedloom.py", "needed.py"} <= {each.name for each in (tmp_path / "site").iterdir()}


def test_a_wheel_that_was_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(folder / "wheels" / "needed-1.2-py3-none-any.whl", "a") as archive:
        archive.writestr("evil.py", "")

    assert sums(folder) != 0
    done = install(folder, tmp_path / "site")
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr


def test_a_bundle_is_not_mixed_with_another(folder: Path, bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bundle.py", str(folder)])

    with pytest.raises(SystemExit, match="has files already"):
        bundle.main()


def test_a_wheel_that_the_index_has_changed_gets_into_no_bundle(tmp_path: Path, bundle: Any) -> None:
    """The lock knows the registry's; of what it does not know, such as torch, the names are told."""
    wheels, locks = tmp_path / "wheels", tmp_path / "locks"
    wheels.mkdir()
    locks.mkdir()
    for name in ("fedloom", "Some_needed", "torch"):
        wheel(wheels, name)
    (path,) = wheels.glob("Some_needed-*")
    hashes = f" \\\n    --hash=sha256:{'0' * 64} \\\n    --hash=sha256:{bundle.digest(path)}\n"
    (locks / "client.txt").write_text(f"# made\nsome-needed==1.2{hashes}other==3{hashes}")

    assert bundle.check(wheels, locks) == ["torch"]

    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("evil.py", "")
    with pytest.raises(SystemExit, match=r"Some_needed-1.2.* has SHA-256 .*, which is none that docker/locks has"):
        bundle.check(wheels, locks)
