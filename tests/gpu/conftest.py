"""The device of these tests, without which they are skipped: `pytest -m gpu` runs them, and others with the marker."""

from pathlib import Path

import pytest
import torch

from fedloom.client.data.rows import Rows
from tests.support.runs import write_rows


@pytest.fixture
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip(f"needs a CUDA device, and torch {torch.__version__} sees none here")
    return "cuda"


@pytest.fixture
def data(tmp_path: Path, rows: Rows) -> Path:
    return write_rows(tmp_path / "data", rows)
