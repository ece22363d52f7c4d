"""Packaged models in other forms become folders that plain Hugging Face code loads, value for value."""

import sys
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.numpy import load_file
from transformers import AutoModel, BertConfig, BertModel, Dinov2Config, Dinov2Model

from fedloom.client.assets.convert import CONVERSIONS, dinov2
from fedloom.client.assets.fetch import ASSETS
from fedloom.client.data.media.images import picture_settings
from fedloom.client.models.load import load_base
from fedloom.client.models.tokenizer import load_tokenizer
from fedloom.client.tasks.api import task_named
from fedloom.core.errors import DataError

LINEAR = ("query.weight", "key.weight", "value.weight", "dense.weight", "fc1.weight", "fc2.weight")


def exported(model: Any, folder: Path, *, leave_out: str = "") -> Path:
    """The model as an exporter leaves it: linear weights and positions are constants without a name of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / "plain")
    values = load_file(folder / "plain" / "model.safetensors")
    constants: list[Any] = []
    nodes: list[Any] = []
    for name, value in values.items():
        if name == "embeddings.position_embeddings":
            constants.append(numpy_helper.from_array(value[:, :1].copy(), "onnx::Concat_7"))
            constants.append(numpy_helper.from_array(value[:, 1:].copy(), "onnx::Add_9"))
        elif name.endswith(LINEAR):
            constant = f"onnx::MatMul_{len(nodes)}"
            constants.append(numpy_helper.from_array(value.T.copy(), constant))
            path = name.removesuffix(".weight").replace(".layer.", ".layer~").replace(".", "/").replace("~", ".")
            nodes.append(helper.make_node("MatMul", ["x", constant], ["y"], name=f"/backbone/{path}/MatMul"))
        elif name != "embeddings.mask_token":
            constants.append(numpy_helper.from_array(value.copy(), f"backbone.{name}"))
    kept = [each for each in constants if not leave_out or not each.name.startswith(leave_out)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], kept)), folder / "model.onnx")
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def vision() -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "mlp_ratio": 2}
    return Dinov2Model(Dinov2Config(image_size=518, patch_size=14, initializer_range=0.2, **size)).eval()


def test_a_vision_model_is_rebuilt_value_for_value(vision: Any, tmp_path: Path) -> None:
    dinov2(exported(vision, tmp_path), tmp_path / "made")

    again = AutoModel.from_pretrained(tmp_path / "made").eval()
    pixels = torch.rand(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).last_hidden_state, vision(pixels).last_hidden_state)
    settings = picture_settings(tmp_path / "made", None)
    assert (settings.side, settings.resized) == (224, 256)
    assert {path.name for path in (tmp_path / "made").iterdir()} == set(ASSETS["dinov2-small"].files)


def test_a_graph_of_another_form_is_refused(vision: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="could hold the positions"):
        dinov2(exported(vision, tmp_path, leave_out="onnx::Concat"), tmp_path / "made")
    with pytest.raises(DataError, match="does not hold a DINOv2 backbone as expected"):
        dinov2(exported(vision, tmp_path, leave_out="backbone.embeddings"), tmp_path / "made")


def write_gguf(path: Path) -> dict[str, Any]:
    """A Llama of one layer with a tokenizer of bytes; returns what it holds."""
    rng, width, wide, vocabulary = np.random.default_rng(0), 32, 64, 260
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 2)
    writer.add_vocab_size(vocabulary)
    letters = [chr(each) for each in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + number) for number in range(256 - len(letters))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", *letters, letters[0] + letters[1], "<|endoftext|>"])
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocabulary, width), "output": (vocabulary, width)}
    shapes |= {f"blk.0.attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (wide, width), "blk.0.ffn_up": (wide, width), "blk.0.ffn_down": (width, wide)}
    shapes |= {name: (width,) for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")}
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in values.items():
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_a_language_model_is_rebuilt_with_its_tokenizer_and_template(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    values = write_gguf(tmp_path / "package" / "model.gguf")

    CONVERSIONS["gguf"](tmp_path / "package" / "model.gguf", tmp_path / "made")

    base, tokenizer, *_ = load_base(tmp_path / "made", task_named("instruct"))
    weights = base.state_dict()
    found = weights["model.layers.0.mlp.down_proj.weight"].numpy()
    np.testing.assert_allclose(found, values["blk.0.ffn_down"], rtol=1e-2)
    np.testing.assert_allclose(weights["lm_head.weight"].numpy(), values["output"], rtol=1e-2)
    assert tokenizer.decode(tokenizer("a film")["input_ids"], skip_special_tokens=True) == "a film"
    assert load_tokenizer(tmp_path / "made").chat_template
    assert set(ASSETS["smollm2-135m"].files) <= {path.name for path in (tmp_path / "made").iterdir()}


@pytest.mark.parametrize(("asset", "blocks"), [("minilm-l3-mean", 4), ("minilm-l3", 3)])
def test_half_of_a_sentence_encoder_is_made_with_its_tokenizer(asset: str, blocks: int, tmp_path: Path) -> None:
    conversion = ASSETS[asset].conversion
    assert conversion
    size = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
    BertModel(BertConfig(num_hidden_layers=6, **size)).save_pretrained(tmp_path / "package")
    for file in ASSETS[asset].files[2:]:
        (tmp_path / "package" / file).write_text("{}", "utf-8")

    CONVERSIONS[conversion](tmp_path / "package" / "model.safetensors", tmp_path / "made")

    whole, made = (AutoModel.from_pretrained(tmp_path / name) for name in ("package", "made"))
    assert made.config.num_hidden_layers == len(made.encoder.layer) == blocks
    theirs = whole.state_dict()
    kept = {
        name: value for name, value in made.state_dict().items() if name.startswith(("embeddings", "encoder.layer.2."))
    }
    assert all(torch.equal(value, theirs[name]) for name, value in kept.items())
    assert {path.name for path in (tmp_path / "made").iterdir()} == set(ASSETS[asset].files)


@pytest.mark.parametrize(("conversion", "package"), [("dinov2", "onnx"), ("gguf", "gguf")])
def test_a_missing_converter_says_what_to_install(
    conversion: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(DataError, match=rf"needs {package}; pip install 'fedloom\[assets\]'"):
        CONVERSIONS[conversion](tmp_path / "model", tmp_path / "made")  # type: ignore[index]  # of the two above
