"""A GGUF file holds the model: tensor for tensor, and when transformers computes with it again."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.gguf_files import save_gguf, write_gguf
from fedloom.client.models.exports.gguf_vocabulary import _LLAMA3, read_vocabulary
from fedloom.client.models.exports.merged_model import merge
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.client.tasks.api import task_named
from fedloom.core.errors import ConfigError, ModelError
from tests.conftest import byte_tokenizer

Build = Callable[..., AdapterModel]
HEADS, KV_HEADS = 4, 2  # of the small Llama in conftest
TEXTS = ["good film", "an awful plot and a poor actor", "42 sad actors"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {each.name: np.array(each.data) for each in gguf.GGUFReader(path).tensors}


def field(path: Path, name: str) -> Any:
    found = gguf.GGUFReader(path).get_field(name)
    assert found is not None, name
    return found.contents()


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Row 2i of a head is its row i, and row 2i + 1 is its row i of the second half: written out row by row."""
    rows, size = [], len(weight) // heads
    for head in range(heads):
        for index in range(size // 2):
            rows += [weight[head * size + index], weight[head * size + size // 2 + index]]
    return np.stack(rows)


@pytest.fixture
def llama(build_task: Build) -> AdapterModel:
    model = build_task("llama", "causal-lm")
    model.tokenizer.chat_template = TEMPLATE
    return model


@pytest.fixture
def merged(llama: AdapterModel, tmp_path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The weights with the adapter folded in; the files are in `gguf`, the PEFT adapter in `peft`."""
    save_adapter(llama, tmp_path / "peft", {})
    values = {name: each.detach().numpy().copy() for name, each in merge(llama, keep=True).state_dict().items()}
    save_gguf(llama, tmp_path / "gguf", {"run": "demo", "base": "models/base"})
    return values


def test_every_tensor_is_there_under_llama_cpps_name(merged: dict[str, np.ndarray[Any, Any]], tmp_path: Path) -> None:
    names = {"embed_tokens": "token_embd", "norm": "output_norm"}
    inner = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names |= {f"layers.{i}.{theirs}": f"blk.{i}.{ours}" for i in range(2) for theirs, ours in inner.items()}
    expected = {f"{ours}.weight": merged[f"model.{theirs}.weight"] for theirs, ours in names.items()}
    expected["output.weight"] = merged["lm_head.weight"]
    for name, value in expected.items():
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        expected[name] = interleaved(value, heads) if heads else value

    found = tensors(tmp_path / "gguf" / "model.gguf")

    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_transformers_computes_the_same_with_it(
    llama: AdapterModel, merged: dict[str, np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    place: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **place
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gguf", **place)
    ours = LlamaForCausalLM(llama.model.config).eval()
    ours.load_state_dict({name: torch.from_numpy(value) for name, value in merged.items()})

    for text in TEXTS:
        ids = llama.tokenizer(text)["input_ids"]
        assert tokenizer(text)["input_ids"] == ids
        with torch.inference_mode():
            found, expected = (model(input_ids=torch.tensor([ids])).logits for model in (again, ours))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert tokenizer.chat_template == TEMPLATE


def test_the_adapter_is_llama_cpps_pair_for_pair(
    merged: dict[str, np.ndarray[Any, Any]], llama: AdapterModel, tmp_path: Path
) -> None:
    path = tmp_path / "gguf" / "adapter.gguf"
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    modules = {"self_attn.q_proj": "attn_q", "self_attn.v_proj": "attn_v", "mlp.down_proj": "ffn_down"}
    expected = {}
    for layer in range(2):
        for theirs, ours in modules.items():
            for side in "AB":
                value = saved[f"base_model.model.model.layers.{layer}.{theirs}.lora_{side}.weight"]
                value = interleaved(value, HEADS) if (ours, side) == ("attn_q", "B") else value
                expected[f"blk.{layer}.{ours}.weight.lora_{side.lower()}"] = value

    found = tensors(path)

    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    told = {name: field(path, name) for name in ("general.type", "general.architecture", "adapter.type")}
    assert told == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    # llama.cpp multiplies by alpha over the rank; the adapter in the base's file must be the merged model's weights.
    scale = field(path, "adapter.lora.alpha") / 2
    start = LlamaForCausalLM.from_pretrained(llama.model.config.name_or_path)
    whole = tensors(tmp_path / "gguf" / "model.gguf")
    for name, theirs, heads in (
        ("blk.0.attn_q", "0.self_attn.q_proj", HEADS),
        ("blk.1.ffn_down", "1.mlp.down_proj", 0),
    ):
        before = start.get_parameter(f"model.layers.{theirs}.weight").detach().numpy()
        change = scale * found[f"{name}.weight.lora_b"] @ found[f"{name}.weight.lora_a"]
        before = interleaved(before, heads) if heads else before
        np.testing.assert_allclose(before + change, whole[f"{name}.weight"], atol=1e-5)
        assert np.abs(change).max() > 1e-2


def test_metadata_is_what_llama_cpp_asks_for(
    merged: dict[str, np.ndarray[Any, Any]], llama: AdapterModel, tmp_path: Path
) -> None:
    path = tmp_path / "gguf" / "model.gguf"
    config, tokenizer = llama.model.config, llama.tokenizer
    expected = {
        "general.type": "model",
        "general.file_type": 0,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.dimension_count": 32 // HEADS,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }

    assert {name: field(path, name) for name in expected} == expected
    assert field(path, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(config.rms_norm_eps)
    assert field(path, "llama.rope.freq_base") == config.rope_parameters["rope_theta"]
    tokens, types = field(path, "tokenizer.ggml.tokens"), field(path, "tokenizer.ggml.token_type")
    assert tokens == tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    assert [token for token, kind in zip(tokens, types, strict=True) if kind == 3] == ["<s>", "</s>"]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert field(path, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]
    assert 'library_name: "gguf"' in (tmp_path / "gguf" / "README.md").read_text()


def test_half_precision_rounds_matrices_and_keeps_vectors(llama: AdapterModel, tmp_path: Path) -> None:
    plain = merge(llama, keep=True)
    write_gguf(plain, llama.tokenizer, llama.task, tmp_path / "gguf", {}, weights="f16")

    found = tensors(tmp_path / "gguf" / "model.gguf")
    assert found["output_norm.weight"].dtype == np.float32
    expected = plain.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    np.testing.assert_array_equal(found["blk.0.ffn_up.weight"], expected.astype(np.float16))
    assert field(tmp_path / "gguf" / "model.gguf", "general.file_type") == 1
    assert not (tmp_path / "gguf" / "adapter.gguf").exists(), "no adapter was given"

    plain.get_parameter("model.layers.0.mlp.up_proj.weight").data[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"up_proj\.weight has values beyond float16; export with --weights f32"):
        write_gguf(plain, llama.tokenizer, llama.task, tmp_path / "other", {}, weights="f16")


def small(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(3)
    size = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    size |= {"num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**{**size, **settings})).eval()


def test_llama_3s_rotary_factors_are_those_of_its_paper(tmp_path: Path) -> None:
    """Frequencies by wavelength: long ones are divided by 8, short ones kept, and those between interpolated."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    plain = small(rope_parameters=rope)
    write_gguf(plain, byte_tokenizer_with_padding(), task_named("causal-lm"), tmp_path / "gguf", {})

    waves = 2 * np.pi * 500000.0 ** (np.arange(0, 16, 2) / 16)
    expected = []
    for wave in waves:
        if wave < 64 / 4:
            expected.append(1.0)
        elif wave > 64 / 1:
            expected.append(8.0)
        else:
            smooth = (64 / wave - 1) / (4 - 1)
            expected.append(1 / ((1 - smooth) / 8 + smooth))
    found = tensors(tmp_path / "gguf" / "model.gguf")["rope_freqs.weight"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(set(np.round(found, 3))) > 1


def byte_tokenizer_with_padding() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_tied_embeddings_are_written_once_and_heads_may_be_wider(tmp_path: Path) -> None:
    plain = small(tie_word_embeddings=True, head_dim=32)
    write_gguf(plain, byte_tokenizer_with_padding(), task_named("causal-lm"), tmp_path / "gguf", {})

    path = tmp_path / "gguf" / "model.gguf"
    assert "output.weight" not in tensors(path)
    assert field(path, "llama.attention.key_length") == field(path, "llama.attention.value_length") == 32
    tokens, types = field(path, "tokenizer.ggml.tokens"), field(path, "tokenizer.ggml.token_type")
    assert (len(tokens), tokens[-1], types[-1]) == (320, "[PAD319]", 5)


def test_other_models_and_tokenizers_are_refused_by_name(build_task: Build, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="class LlamaForCausalLM, and this is a GPT2LMHeadModel; export with format"):
        save_gguf(build_task("gpt2", "causal-lm"), tmp_path / "gguf", {})
    with pytest.raises(ModelError, match=r"this is a LlamaForTokenClassification; .* or with onnx if it classifies"):
        save_gguf(build_task("llama", "token-classification"), tmp_path / "gguf", {})
    with pytest.raises(ModelError, match=r"hidden_act = 'gelu' \(silu\)"):
        write_gguf(small(hidden_act="gelu"), None, task_named("causal-lm"), tmp_path / "gguf", {})
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    with pytest.raises(ModelError, match=r"rope_type = 'yarn' \(default, linear, llama3\)"):
        write_gguf(small(rope_parameters=rope), None, task_named("causal-lm"), tmp_path / "gguf", {})
    assert not (tmp_path / "gguf").exists()


def test_splits_are_told_apart_and_unknown_ones_refused(tiny_base: Path) -> None:
    def split(*steps: Any) -> str:
        tokenizer = byte_tokenizer_with_padding()
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
        return read_vocabulary(tokenizer, 320).split

    every = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert split(pre_tokenizers.Digits(individual_digits=True), every) == "smollm"
    assert split(every) == "gpt-2"
    alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pattern = pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated")
    for unlike in (
        (pattern, alone),  # Llama 3's, but merging before whole tokens are looked up
        (pre_tokenizers.Digits(), every),
        (pre_tokenizers.ByteLevel(add_prefix_space=True),),
        (alone,),
    ):
        with pytest.raises(ModelError, match="GPT-2, SmolLM2 or Llama 3 do, and this one is BPE with"):
            split(*unlike)
    with pytest.raises(ModelError, match="this one is WordPiece with BertPreTokenizer"):
        read_vocabulary(AutoTokenizer.from_pretrained(tiny_base), 40_000)
    with pytest.raises(ModelError, match=r"the tokenizer has .* tokens, and the model 10; it is another model's"):
        read_vocabulary(byte_tokenizer_with_padding(), 10)


def test_a_missing_package_is_named_with_what_installs_it(
    llama: AdapterModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)

    with pytest.raises(ConfigError, match=r"format gguf needs gguf; pip install 'fedloom\[gguf\]'"):
        save_gguf(llama, tmp_path / "gguf", {})


def test_llama_cpp_itself_computes_the_same(llama: AdapterModel, small_bases: dict[str, Path], tmp_path: Path) -> None:
    """Where its Python package is installed. It keeps keys and values in 16 bits: most of the difference is that."""
    llama_cpp = pytest.importorskip("llama_cpp")
    ids = {text: llama.tokenizer(text)["input_ids"] for text in TEXTS}
    with torch.inference_mode():
        expected = {text: llama.model(input_ids=torch.tensor([each])).logits[0].numpy() for text, each in ids.items()}
    base = LlamaForCausalLM.from_pretrained(small_bases["llama"]).eval()
    write_gguf(base, llama.tokenizer, llama.task, tmp_path / "base", {})
    save_gguf(llama, tmp_path / "gguf", {})

    whole = {"model_path": str(tmp_path / "gguf" / "model.gguf")}
    pair = {"model_path": str(tmp_path / "base" / "model.gguf"), "lora_path": str(tmp_path / "gguf" / "adapter.gguf")}
    for files in (whole, pair):
        for text in TEXTS:
            program = llama_cpp.Llama(**files, logits_all=True, n_ctx=64, verbose=False)
            assert program.tokenize(text.encode(), add_bos=False) == ids[text]
            program.eval(ids[text])
            found = np.array(program.scores[: len(ids[text])])
            np.testing.assert_allclose(found, expected[text], rtol=0, atol=1e-2)
