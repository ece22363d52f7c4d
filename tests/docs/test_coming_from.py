"""The pages for who comes from elsewhere: their code before and after trains the same adapter, on a tiny model."""

import csv
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import fedloom.api as fl
from fedloom.conformance.tiny_model import save_tiny_model
from tests.docs.blocks import blocks
from tests.test_meta import ROOT

PAGES = {"from-hf-trainer.md": "transformers", "from-flower.md": "flwr", "from-nvflare.md": "nvflare"}
"""What the code before needs."""

ENVIRONMENTS = {"flwr": "flower", "nvflare": "nvflare"}
"""Those that have one of their own, in .venv-peers."""

BASE = "google-bert/bert-base-uncased"
TOLERANCE = 1e-5
"""As the pages say: the steps are the same float32 operations, padded and added in another order."""

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(900)]  # a busy machine must not fail one


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows of two clinics of unequal size and of a test, in the words of a tiny model."""
    save_tiny_model(tmp_path / "base")
    draw = random.Random(0)
    for name, count in (("clinic-a", 24), ("clinic-b", 16), ("test", 20)):
        with (tmp_path / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(("text", "label"))
            for number in range(count):
                good = number % 2
                words = " ".join(f"w{draw.randrange(20) + 20 * good}" for _ in range(draw.randrange(4, 12)))
                table.writerow((words, ("negative", "positive")[good]))
    return tmp_path


def python_with(module: str) -> str:
    """An interpreter that has it, or skip."""
    if importlib.util.find_spec(module) is not None:
        return sys.executable
    found = ROOT / ".venv-peers" / ENVIRONMENTS[module] / "bin" / "python"
    if not found.exists():
        pytest.skip(
            f"{module} is not installed; `make .venv-peers/{ENVIRONMENTS[module]}/.ready` makes its environment"
        )
    return str(found)


def run(python: str, script: str, folder: Path) -> str:
    """What a script of a page prints."""
    quiet = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    told = {
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(folder),
    }
    log = folder / f"{script}.log"
    with log.open("wb") as file:
        command = [python, "-W", "ignore", script]
        done = subprocess.run(command, cwd=folder, env=quiet | told, stdout=file, stderr=file, check=False)
    said = log.read_text(encoding="utf-8", errors="replace")
    assert done.returncode == 0, f"{script}: {said[-4000:]}"
    return said


def tensors(adapter: Path) -> dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.float32]]"]:
    return dict(load_file(adapter / "adapter_model.safetensors"))


@pytest.mark.parametrize("page", PAGES)
def test_before_and_after_end_with_the_same_adapter(page: str, folder: Path) -> None:
    python = python_with(PAGES[page])
    for block in blocks(page):
        assert block.mark.startswith("file="), f"{page} line {block.line} is not run"
        name = block.mark.removeprefix("file=")
        (folder / name).write_text(block.text.replace(BASE, str(folder / "base")), encoding="utf-8")

    run(python, "before.py", folder)
    assert "not private" in run(sys.executable, "after.py", folder)

    start, before, after = (tensors(folder / path) for path in ("start", "before", "runs/after/adapter"))
    assert start.keys() == before.keys() == after.keys()
    moved = max(float(np.abs(before[name] - start[name]).max()) for name in start)
    apart = max(float(np.abs(before[name] - after[name]).max()) for name in start)
    assert apart <= TOLERANCE
    assert moved > 1000 * TOLERANCE, "it trains, and a claim of 10⁻⁵ says something"
    if page == "from-hf-trainer.md":
        assert "epsilon" in run(sys.executable, "private.py", folder)
        facts = json.loads((folder / "runs/private/adapter/fedloom.json").read_text(encoding="utf-8"))
        assert 0 < facts["privacy"]["epsilon"] <= fl.load(folder / "private.toml").config.privacy.epsilon == 6
    else:
        assert fl.load(folder / "run.toml").config.strategy.weighting == "examples"
