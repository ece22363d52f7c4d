"""The result of a Llama-like language model as GGUF files, which llama.cpp and what is built on it run.

Names of keys and tensors, the order of rows in the projections of queries and keys, and the layout of an adapter are
those of llama.cpp's own converters, convert_hf_to_gguf.py and convert_lora_to_gguf.py.
"""

import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file
from transformers import PreTrainedModel

from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.card import write_card
from fedloom.client.models.exports.gguf_vocabulary import add_vocabulary, read_vocabulary
from fedloom.client.models.exports.merged_model import merge
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.client.tasks.api import Task
from fedloom.core.config.parsing import read_json
from fedloom.core.errors import ConfigError, ModelError
from fedloom.core.model_card import Form
from fedloom.core.peft_settings import PREFIX, lora_scale, more_than_pairs
from fedloom.core.runtime.export_folder import replace_export
from fedloom.core.schema import Array

__all__ = ["ADAPTER", "MODEL", "Weights", "save_gguf", "write_gguf"]

MODEL, ADAPTER = "model.gguf", "adapter.gguf"
"""What the files are called: the whole model, and the adapter for llama.cpp's own file of the base model."""

Weights = Literal["f32", "f16"]
"""Matrices in 32 or 16 bits; vectors are in 32 always, as llama.cpp wants them."""

_ARCHITECTURE = "llama"
_WHAT = "A whole model, trained with fedloom, as a GGUF file."

_LOADING = """llama-cli -m "THIS FOLDER/model.gguf" -p "a prompt\""""

_NOTES = """`adapter.gguf` is the adapter by itself, for a GGUF file of the base model: `llama-cli -m BASE.gguf --lora
"THIS FOLDER/adapter.gguf"`.
"""


def save_gguf(model: AdapterModel, folder: Path, facts: dict[str, Any], weights: Weights = "f32") -> None:
    """Write a model with its adapter by `write_gguf`; it is used up.

    Raises:
        ModelError: As by `merge` or `write_gguf`.
        ConfigError: As by `write_gguf`.
    """
    _check(model.model.get_base_model())
    with tempfile.TemporaryDirectory() as scratch:
        adapter = Path(scratch) / "adapter" if model.adapter.traits.peft else None
        if adapter is not None:
            save_adapter(model, adapter, facts)
        write_gguf(merge(model), model.tokenizer, model.task, folder, facts, adapter, weights)


def write_gguf(
    plain: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    folder: Path,
    facts: dict[str, Any],
    adapter: Path | None = None,
    weights: Weights = "f32",
) -> None:
    """Write a merged model as model.gguf, its adapter as adapter.gguf, a card, and `facts` as fedloom.json.

    Args:
        plain: A LlamaForCausalLM with the adapter in its weights, see `merge`.
        tokenizer: Its tokenizer, a BPE of bytes.
        task: What it was trained for.
        folder: Where to, see `replace_export`.
        facts: See `facts`.
        adapter: Folder of the PEFT adapter. There is no adapter.gguf without one, or if it is more than LoRA pairs.
        weights: How wide the matrices are; f32 keeps the model as it is, f16 rounds to half the bytes.

    Raises:
        ModelError: The model or its tokenizer is none that can be written, or a weight is beyond float16.
        ConfigError: The package gguf is missing, or the folder holds other files or cannot be written.
    """
    _check(plain)
    try:
        import gguf as _  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError("format gguf needs gguf; pip install 'fedloom[gguf]'") from error
    vocabulary = read_vocabulary(tokenizer, plain.config.vocab_size)
    pairs = _pairs(adapter, plain.config) if adapter is not None else None

    def write(draft: Path) -> None:
        writer = _writer(draft / MODEL, facts)
        _add_settings(writer, plain.config, weights)
        add_vocabulary(writer, vocabulary)
        for name, value in _tensors(plain, weights).items():
            writer.add_tensor(name, value)
        _finish(writer)
        if pairs is not None:
            _write_adapter(draft / ADAPTER, *pairs, facts)
        form = Form("gguf", ("gguf", "llama.cpp"), _WHAT, _LOADING, "sh", _NOTES if pairs else "")
        write_card(draft, form, task, facts)

    replace_export(folder, write)


def _check(plain: PreTrainedModel) -> None:
    """Refuse what llama.cpp's architecture "llama" does not compute."""
    config = plain.config
    if type(plain).__name__ != "LlamaForCausalLM":
        raise ModelError(
            f"format gguf is for language models of the class LlamaForCausalLM, and this is a {type(plain).__name__}; "
            "export with format merged, or with onnx if it classifies"
        )
    odd = None
    if config.hidden_act != "silu":
        odd = f"hidden_act = {config.hidden_act!r} (silu)"
    elif (rotary := plain.model.rotary_emb).attention_scaling != 1 or rotary.rope_type not in _ROPE:
        odd = f"rope_type = {rotary.rope_type!r} ({', '.join(_ROPE)})"
    if odd:
        raise ModelError(f"format gguf cannot say {odd} of a model; export with format merged")


_ROPE = ("default", "linear", "llama3")
"""Rotary embeddings whose frequencies are fixed multiples of the plain ones."""


def _writer(path: Path, facts: dict[str, Any]) -> Any:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, _ARCHITECTURE)
    writer.add_name(facts.get("run", "model"))
    return writer


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_settings(writer: Any, config: Any, weights: Weights) -> None:
    from gguf import GGML_QUANT_VERSION, GGUFType, LlamaFileType

    writer.add_type(GGUFType.MODEL)
    writer.add_file_type(LlamaFileType.ALL_F32 if weights == "f32" else LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def _tensors(plain: PreTrainedModel, weights: Weights) -> dict[str, Array]:
    """All weights by llama.cpp's names."""
    found: dict[str, Array] = {}
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    for name, value in plain.state_dict().items():
        if tied and name == "lm_head.weight":
            continue  # llama.cpp then takes the embeddings
        array = _rows(name, value.detach().to("cpu").float().numpy(), plain.config)
        found[_named(name, plain.config)] = _narrow(name, array) if weights == "f16" and array.ndim > 1 else array
    factors = _frequency_factors(plain)
    if not np.all(factors == 1):
        found["rope_freqs.weight"] = factors
    return found


def _frequency_factors(plain: PreTrainedModel) -> Array:
    """What llama.cpp divides each rotary frequency by, float32, shape (head_dim / 2,)."""
    config = plain.config
    powers = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    usual = config.rope_parameters["rope_theta"] ** -powers
    ours = plain.model.rotary_emb.inv_freq.to("cpu").double().numpy()
    factors = (usual / ours).astype(np.float32)
    return np.where(np.isclose(factors, 1, rtol=1e-6), np.float32(1), factors)


def _rows(name: str, value: Array, config: Any) -> Array:
    """A projection of queries or keys with its rows as llama.cpp rotates them; other tensors stay as they are.

    llama.cpp turns a row with its neighbour, transformers with the one half a head further.
    """
    projection = name.rpartition(".")[0].rpartition(".")[2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(projection)
    if heads is None:
        return value
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(value.shape))


def _named(name: str, config: Any) -> str:
    """A tensor's name in llama.cpp."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ModelError(f"llama.cpp has no name for the weight {name}; export with format merged")
    return found


def _narrow(name: str, value: Array) -> Any:
    if np.abs(value).max(initial=0) > np.finfo(np.float16).max:
        raise ModelError(f"{name} has values beyond float16; export with --weights f32")
    return value.astype(np.float16)


def _pairs(folder: Path, config: Any) -> tuple[dict[str, Array], float] | None:
    """An adapter's factors by llama.cpp's names, and its alpha; None if it is more than pairs on linear layers."""
    settings = read_json(folder / "adapter_config.json")
    if settings.get("peft_type") != "LORA" or more_than_pairs(settings):
        return None
    found: dict[str, Array] = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        module, mark, side = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if not mark or side not in ("A", "B"):
            return None
        weight = f"{module}.weight"
        # Rows of B·A are rows of B.
        found[f"{_named(weight, config)}.lora_{side.lower()}"] = (
            _rows(weight, value, config) if side == "B" else np.ascontiguousarray(value)
        )
    rank = max((len(value) for name, value in found.items() if name.endswith(".lora_a")), default=0)
    # llama.cpp's scale is alpha over the rank, whatever PEFT's was.
    return (found, lora_scale(settings) * rank) if found else None


def _write_adapter(path: Path, tensors: dict[str, Array], alpha: float, facts: dict[str, Any]) -> None:
    from gguf import GGUFType, Keys, LlamaFileType

    writer = _writer(path, facts)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    for name, value in tensors.items():
        writer.add_tensor(name, value.astype(np.float32))
    _finish(writer)
