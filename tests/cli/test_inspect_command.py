"""`fedloom inspect` on run folders and PEFT adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.core.config.run import AdapterSection
from fedloom.core.errors import ConfigError

Build = Callable[[AdapterSection], AdapterModel]


def invoke(*words: str | Path) -> str:
    done = CliRunner().invoke(app, ["inspect", *map(str, words)], env={"COLUMNS": "80"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def saved(model: AdapterModel, folder: Path, seed: int, **facts: Any) -> Path:
    draw = np.random.default_rng(seed)
    model.load({s.name: draw.normal(0, 0.3, s.shape).astype(np.float32) for s in model.schema.tensors})
    save_adapter(model, folder, {"base": "tiny", **facts})
    return folder


def test_a_run_folder_is_read_as_its_adapter(build_model: Build, tmp_path: Path) -> None:
    model = build_model(AdapterSection(rank=3, alpha=6))
    for seed, name in enumerate(("north", "south")):
        saved(model, tmp_path / name / "adapter", seed)

    document = json.loads(invoke(tmp_path / "north", "--against", tmp_path / "south" / "adapter", "--json"))

    tensors = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("north", "south")]
    assert len(document["layers"]) == 4
    for layer in document["layers"]:
        a, b = (f"base_model.model.{layer['module']}.lora_{side}.weight" for side in "AB")
        one, two = (2.0 * each[b].astype(np.float64) @ each[a] for each in tensors)
        np.testing.assert_allclose(layer["singular_values"], np.linalg.svd(one, compute_uv=False)[:3], rtol=1e-6)
        assert layer["norm"] == pytest.approx(np.linalg.norm(one), rel=1e-6)
        cosine = np.sum(one * two) / (np.linalg.norm(one) * np.linalg.norm(two))
        assert layer["cosine"] == pytest.approx(cosine, rel=1e-5)
    text = invoke(tmp_path / "north", "--against", tmp_path / "north")
    assert text.splitlines()[0].split() == [
        "layer",
        "norm",
        "largest",
        "effective",
        "rank",
        "cosine",
        "inputs",
        "outputs",
    ]
    row = next(line.split() for line in text.splitlines() if line.startswith("0.attention.self.query"))
    assert row[4:] == ["of", "3", "1.000", "1.000", "1.000"]
    assert "layers of bert.encoder.layer" in text
    assert "cosine" not in invoke(tmp_path / "north")


def test_a_head_alone_has_no_layers_to_show(build_model: Build, tmp_path: Path) -> None:
    folder = saved(build_model(AdapterSection(kind="head")), tmp_path / "head", 0)

    layers = json.loads(invoke(folder, "--json"))["layers"]

    assert all(each["norm"] == 0 and each["effective_rank"] == 0 for each in layers)


def test_what_cannot_be_compared_is_refused(build_model: Build, tmp_path: Path) -> None:
    one = saved(build_model(AdapterSection(rank=2, targets=("query",))), tmp_path / "one", 0, base_digest="sha256:1")
    two = saved(build_model(AdapterSection(rank=2)), tmp_path / "two", 1, base_digest="sha256:1")
    other = saved(build_model(AdapterSection(rank=2)), tmp_path / "other", 1, base_digest="sha256:2")

    with pytest.raises(ConfigError, match=r"not on the same layers: only one has .*value"):
        invoke(one, "--against", two)
    with pytest.raises(ConfigError, match="base model 'sha256:1'"):
        invoke(one, "--against", other)
    with pytest.raises(ConfigError, match="holds no PEFT adapter"):
        invoke(tmp_path)
