"""A federation through Flower's own superlink and supernode processes gives what our coordinator gives."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedloom.core.config.run import load_run
from fedloom.core.schema import Tensors
from fedloom.simulation.simulate import simulate
from tests.flower.federation import FLOWER, WAIT_S, superlink, write_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.timeout(900),  # under a minute alone, and many processes to start on a busy machine
    pytest.mark.skipif(
        not (FLOWER / "flower-superlink").exists(),
        reason="Flower is not installed; `make flower` makes its environment, whose pins exclude ours",
    ),
]

TOLERANCE = 1e-5
"""Largest difference of one value between two engines: the steps are the same float32 operations on one machine."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A path short enough for the sockets of the resident trainers."""
    made = Path(tempfile.mkdtemp(prefix="fl"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


def fedloom(*arguments: object) -> None:
    command = [sys.executable, "-m", "fedloom.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert done.returncode == 0, done.stdout + done.stderr


def adapter(folder: Path) -> Tensors:
    tensors: Tensors = load_file(folder / "adapter_model.safetensors")
    return tensors


def test_two_nodes_give_the_adapter_of_the_grpc_engine(folder: Path, tiny_base: Path) -> None:
    run = write_run(folder, tiny_base, clients=2)
    fedloom("flower", "export", folder / "app", "--run", run, "--clients", folder / "c")
    policies = {name: folder / "c" / name / "policy.toml" for name in ("client-0", "client-1")}

    with superlink(folder, policies) as link:
        said = link.run(folder / "app", folder / "runs")
        assert "run over" in said, said + link.said()

    fedloom("export", folder / "app" / "run.toml", "--state", folder / "runs/tiny/state", "--out", folder / "adapter")
    expected = adapter(simulate(load_run(run), folder / "grpc").folder / "adapter")
    found = adapter(folder / "adapter")

    assert found.keys() == expected.keys()
    assert max(float(np.abs(found[name] - expected[name]).max()) for name in found) < TOLERANCE
    assert max(float(np.abs(value).max()) for value in expected.values()) > 1e-2
    assert not list((folder / "c").rglob("*.update")), "every site has heard that the run is over"
    for name in policies:
        log = (folder / "c" / name / "flower" / "node.log").read_text()
        assert log.count("listening") == 1, "one trainer for all messages"
