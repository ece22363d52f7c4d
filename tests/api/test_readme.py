"""The README's ten lines of Python make a private adapter from a list of dicts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedloom.client.assets.fetch import cache_dir, fetch

README = Path(__file__).parents[2] / "README.md"


def block() -> str:
    """The block of the README that runs Python."""
    (found,) = re.findall(r"^```sh\n(python -c .*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
    return str(found)


def test_it_is_ten_lines() -> None:
    lines = [line for line in block().splitlines()[1:-1] if line and not line.startswith((" ", "from", "import"))]

    assert len(lines) <= 10


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(900)  # a whole run; a busy machine must not fail it
def test_it_makes_a_private_adapter(tmp_path: Path) -> None:
    fetch("minilm-l6")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    search = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    # A link to an interpreter is no longer in its virtual environment: the packages' place is told.
    packages = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PATH": search, "PYTHONPATH": packages, "FEDLOOM_CACHE": str(cache_dir())}

    done = subprocess.run(
        ["bash", "-euc", block()], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert re.search(r"fl\.Result\('runs/run': 2 rounds, accuracy [\d.]+%, epsilon (5\.\d\d|6\.00)\)", done.stdout)
    adapter = tmp_path / "runs" / "run" / "adapter"
    assert (adapter / "adapter_model.safetensors").is_file()
    assert 0 < json.loads((adapter / "fedloom.json").read_text())["privacy"]["epsilon"] <= 6
