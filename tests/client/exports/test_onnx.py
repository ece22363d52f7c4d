"""What onnxruntime makes of an export is what the PEFT-loaded model says."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from fedloom.client.data.media.images import picture_settings
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.loading import load_exported
from fedloom.client.models.exports.onnx_graph import save_onnx
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ConfigError, ModelError
from tests.conftest import make_model

Build = Callable[..., AdapterModel]
LABELS = ("O", "PER", "LOC")


def session(folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("architecture", "task"),
    [("bert", "text-classification"), ("bert", "token-classification"), ("llama", "text-classification")],
)
def test_texts_of_any_number_and_length_get_the_scores_of_the_peft_adapter(
    build_task: Build, small_bases: dict[str, Path], tmp_path: Path, architecture: str, task: str
) -> None:
    model = build_task(architecture, task)
    save_adapter(model, tmp_path / "peft", {"run": "demo"})
    save_onnx(model, tmp_path / "onnx", {"run": "demo", "task": task, "labels": list(LABELS)})
    theirs = load_exported(small_bases[architecture], tmp_path / "peft", len(LABELS), task)

    graph, tokenizer = session(tmp_path / "onnx"), AutoTokenizer.from_pretrained(tmp_path / "onnx")

    for texts in (["good film"], ["sad", "an awful plot and a very poor actor"], ["fine", "the", "a happy film", "x"]):
        rows = dict(tokenizer(texts, padding=True, return_token_type_ids=False, return_tensors="np"))
        assert rows.keys() == {"input_ids", "attention_mask"}
        (found,) = graph.run(None, rows)
        with torch.inference_mode():
            expected = theirs(**{name: torch.from_numpy(value) for name, value in rows.items()}).logits.numpy()
        seen = rows["attention_mask"].astype(bool) if task == "token-classification" else slice(None)
        np.testing.assert_allclose(found[seen], expected[seen], rtol=0, atol=1e-4)
        assert found[seen].std() > 1e-2


@pytest.mark.parametrize(("architecture", "targets"), [("vit", ("q_proj", "v_proj")), ("dinov2", ("q_proj", "v_proj"))])
def test_images_too_with_what_prepares_them(
    vision_bases: dict[str, Path], tmp_path: Path, architecture: str, targets: tuple[str, ...]
) -> None:
    task = "image-classification"
    section = ModelSection.model_validate({"base": str(vision_bases[architecture]), "task": task, "labels": LABELS})
    model = make_model(section, AdapterSection(rank=2, alpha=4, targets=targets))
    reader = model.tokenizer
    save_adapter(model, tmp_path / "peft", {})
    save_onnx(model, tmp_path / "onnx", {"task": task, "labels": list(LABELS)})
    theirs = load_exported(vision_bases[architecture], tmp_path / "peft", len(LABELS), task)

    pixels = torch.rand(5, 3, reader.side, reader.side)
    (found,) = session(tmp_path / "onnx").run(None, {"pixel_values": pixels.numpy()})

    with torch.inference_mode():
        np.testing.assert_allclose(found, theirs(pixel_values=pixels).logits.numpy(), rtol=0, atol=1e-4)
    (tmp_path / "onnx" / "config.json").write_text("{}")
    assert picture_settings(tmp_path / "onnx", None) == reader


def test_the_folder_has_a_free_graph_the_tokenizer_and_what_a_user_should_know(
    tiny_model: AdapterModel, tmp_path: Path
) -> None:
    save_onnx(tiny_model, tmp_path / "onnx", {"run": "demo", "labels": ["negative", "positive"]})

    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    axes = {each.name: [dim.dim_param for dim in each.type.tensor_type.shape.dim] for each in graph.input}
    assert axes == {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
    assert json.loads((tmp_path / "onnx" / "fedloom.json").read_text())["run"] == "demo"
    assert 'library_name: "onnx"' in (tmp_path / "onnx" / "README.md").read_text()


def test_a_graph_that_says_something_else_is_not_written(
    tiny_model: AdapterModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = torch.onnx.export

    def wrong(model: nn.Module, *arguments: Any, **options: Any) -> None:
        export(model, *arguments, **options)
        with torch.no_grad():
            model.get_parameter("model.classifier.bias").add_(1e-2)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(ModelError, match="gives other scores than the model for 1 rows of length 3"):
        save_onnx(tiny_model, tmp_path / "onnx", {})

    assert not (tmp_path / "onnx").exists()


def test_a_model_that_cannot_be_traced_is_one_clear_error(
    tiny_model: AdapterModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no operator for it\nand much more")

    monkeypatch.setattr(torch.onnx, "export", fail)

    with pytest.raises(ModelError, match="cannot export BertForSequenceClassification to ONNX: no operator for it; ex"):
        save_onnx(tiny_model, tmp_path / "onnx", {})


def test_a_language_model_is_sent_to_another_format(build_task: Build, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="CausalLM generates texts; export with format gguf or merged"):
        save_onnx(build_task("llama", "causal-lm"), tmp_path / "onnx", {})


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_what_installs_it(
    package: str, tiny_model: AdapterModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(ConfigError, match=rf"format onnx needs {package}; pip install 'fedloom\[onnx\]'"):
        save_onnx(tiny_model, tmp_path / "onnx", {})
