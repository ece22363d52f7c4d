"""Small runs on the tiny model."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import fedloom.api as fl
from fedloom.client.data.rows import Rows, documents

LABELS = ["negative", "positive"]


@pytest.fixture
def listed(rows: Rows) -> list[dict[str, Any]]:
    """Forty rows as dicts."""
    return list(documents(rows))


@pytest.fixture
def data(listed: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of two clinics; ten more are for scores."""
    return {"clinic-a": listed[:15], "clinic-b": listed[15:30]}


@pytest.fixture
def tiny_run(tiny_base: Path) -> Callable[..., fl.Run]:
    """Makes runs. They take every row in every step and add no noise, so that they come out the same each time."""

    def make(**changes: Any) -> fl.Run:
        arguments: dict[str, Any] = {
            "model": tiny_base,
            "task": fl.TextClassification(labels=LABELS, max_length=16),
            "adapter": fl.LoRA(rank=4, alpha=8),
            "train": fl.Train(steps=2, sampling_rate=1.0, learning_rate=0.5),
            "privacy": None,
            "rounds": 2,
            "seed": 3,
            "name": "tiny",
            "engine": fl.Engine(threads=1),
        }
        return fl.Run(**(arguments | changes))

    return make


@pytest.fixture
def go(tmp_path: Path, data: dict[str, Any], listed: list[dict[str, Any]]) -> Callable[..., fl.Result]:
    """Simulates a run on the two clinics, or on other data."""

    def go(run: fl.Run, given: Any = None, **arguments: Any) -> fl.Result:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            defaults: dict[str, Any] = {"test": listed[30:], "out": tmp_path / "runs", "progress": False}
            return fl.simulate(run, data if given is None else given, **(defaults | arguments))

    return go


def tensors(folder: Path) -> dict[str, "np.ndarray[Any, Any]"]:
    """What an exported adapter holds."""
    return dict(load_file(folder / "adapter_model.safetensors"))


def same(a: Path, b: Path) -> bool:
    """Whether two exported adapters have the same values, bit for bit."""
    ours, theirs = tensors(a), tensors(b)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
