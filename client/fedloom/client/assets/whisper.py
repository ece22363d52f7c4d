"""A Whisper model from CTranslate2's form, rewritten as a folder that `from_pretrained` reads.

The file is a header, then variables (name, dimensions, type, bytes), then other names for some of them:
`save_binary` of https://github.com/OpenNMT/CTranslate2/blob/v4.8.0/python/ctranslate2/specs/model_spec.py.
"""

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedloom.core.errors import DataError

__all__ = ["variables", "whisper"]

Array = npt.NDArray[Any]

_SPEC, _VERSIONS = "WhisperSpec", range(2, 7)
_TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
"""numpy's types by CTranslate2's numbers; bfloat16 is not read."""
_MOST_DIMENSIONS = 8
_GELU = 3
_WINDOW, _RATE, _HOP = 30, 16000, 160
"""Seconds that every Whisper model reads, samples in a second, and samples from one frame to the next."""
_BYTES = 256
_TIMESTAMPS, _STEP = 1501, 0.02
"""Tokens for 0.00 to 30.00 seconds follow the last special token."""


def variables(data: bytes) -> dict[str, Array]:
    """The variables of a CTranslate2 model of Whisper, by name; read-only views of `data`.

    Raises:
        ValueError: It is none, is cut off, or goes on behind its end.
    """
    reader = _Reader(data)
    version, spec = reader.number("I"), reader.text()
    if version not in _VERSIONS or spec != _SPEC:
        raise ValueError(f"it holds {spec!r} in version {version}; {_SPEC!r} in version 2 to 6 is needed")
    reader.number("I")  # the revision of the specification
    found: dict[str, Array] = {}
    for _ in range(reader.number("I")):
        name, rank = reader.text(), reader.number("B")
        if rank > _MOST_DIMENSIONS:
            raise ValueError(f"{name} has {rank} dimensions; {_MOST_DIMENSIONS} at most are read")
        shape = tuple(reader.number("I") for _ in range(rank))
        kind, size = reader.number("B"), reader.number("I")
        if kind not in _TYPES:
            raise ValueError(f"{name} is of type {kind}; types {min(_TYPES)} to {max(_TYPES)} are read")
        if size != math.prod(shape) * np.dtype(_TYPES[kind]).itemsize:
            raise ValueError(f"{name} has {size} bytes, which is not what shape {shape} takes")
        found[name] = np.frombuffer(reader.take(size), _TYPES[kind]).reshape(shape)
    for _ in range(reader.number("I")):
        alias, name = reader.text(), reader.text()
        if name not in found:
            raise ValueError(f"{alias} stands for {name}, which is not there")
        found[alias] = found[name]
    if reader.left:
        raise ValueError(f"{reader.left} bytes follow its end")
    return found


class _Reader:
    """Values one after the other, never beyond the end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = memoryview(data), 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int) -> memoryview:
        if size > self.left:
            raise ValueError(f"it ends {size - self.left} bytes too early")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, kind: str) -> int:
        (value,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))
        return int(value)

    def text(self) -> str:
        """A name: its length, then so many bytes, of which the last is zero."""
        return bytes(self.take(self.number("H"))).rstrip(b"\0").decode("ascii")


def whisper(source: Path, folder: Path) -> None:
    """A multilingual Whisper model with its tokenizer, set to transcribe English.

    Args:
        source: The first part of the model, beside it all others, CTranslate2's config.json, and tokenizer.json.
        folder: New. It has the model in float16, as it was packaged.

    Raises:
        DataError: The files do not hold such a model.
    """
    from safetensors.numpy import save_file

    parts = sorted(source.parent.glob(f"{source.name.rpartition('.part')[0]}.part*"))
    try:
        known = variables(b"".join(part.read_bytes() for part in parts))
        settings, tokenizer = (_json(source.parent / name) for name in ("config.json", "tokenizer.json"))
        marks = {each["content"]: int(each["id"]) for each in tokenizer["added_tokens"]}
        weights, config = _weights(known), _config(known, marks)
        generation = _generation(settings, marks, config)
        tokenizer["model"]["merges"] = _merges(tokenizer["model"])
        tokenizer["added_tokens"] += _timestamps(max(marks.values()) + 1)
        if len(tokenizer["model"]["vocab"] | marks) + _TIMESTAMPS != config["vocab_size"]:
            raise ValueError(f"its tokenizer has not {config['vocab_size']} tokens, as its embeddings have")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{source.name} does not hold a Whisper model as expected: {error}") from error
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in {
        "config.json": config,
        "generation_config.json": generation,
        "preprocessor_config.json": _extractor(config["num_mel_bins"]),
        "tokenizer_config.json": _TOKENIZER,
        "tokenizer.json": tokenizer,
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _weights(known: Mapping[str, Array]) -> dict[str, Array]:
    """The model's tensors by transformers' names. Queries, keys and values lie in one matrix."""
    found = {
        "model.encoder.embed_positions.weight": known["encoder/position_encodings/encodings"],
        "model.decoder.embed_positions.weight": known["decoder/position_encodings/encodings"],
        "model.decoder.embed_tokens.weight": known["decoder/embeddings/weight"],
    }
    if known["decoder/projection/weight"] is not known["decoder/embeddings/weight"]:
        raise ValueError("its output layer has weights of its own")
    for name in ("conv1", "conv2"):
        found |= _split(known, f"encoder/{name}", "model.encoder", (name,))
    for side in ("encoder", "decoder"):
        found |= _norm(known, f"{side}/layer_norm", f"model.{side}.layer_norm")
        for at in range(_layers(known, side)):
            theirs, ours = f"{side}/layer_{at}", f"model.{side}.layers.{at}"
            found |= _norm(known, f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            attention = f"{ours}.self_attn"
            found |= _split(known, f"{theirs}/self_attention/linear_0", attention, ("q_proj", "k_proj", "v_proj"))
            found |= _split(known, f"{theirs}/self_attention/linear_1", attention, ("out_proj",))
            if side == "decoder":
                found |= _norm(known, f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                for place, names in enumerate((("q_proj",), ("k_proj", "v_proj"), ("out_proj",))):
                    found |= _split(known, f"{theirs}/attention/linear_{place}", f"{ours}.encoder_attn", names)
            found |= _norm(known, f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            for place, name in enumerate(("fc1", "fc2")):
                found |= _split(known, f"{theirs}/ffn/linear_{place}", ours, (name,))
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def _norm(known: Mapping[str, Array], theirs: str, ours: str) -> dict[str, Array]:
    return {f"{ours}.weight": known[f"{theirs}/gamma"], f"{ours}.bias": known[f"{theirs}/beta"]}


def _split(known: Mapping[str, Array], theirs: str, ours: str, names: Iterable[str]) -> dict[str, Array]:
    """Weights and biases of layers that lie one below the other. Keys have no bias: theirs must be zero."""
    names, found = tuple(names), dict[str, Array]()
    for kind in ("weight", "bias"):
        parts = np.split(known[f"{theirs}/{kind}"], len(names))
        found |= {f"{ours}.{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
    for name in [name for name in found if name.endswith("k_proj.bias")]:
        if found.pop(name).any():
            raise ValueError(f"{name} is not zero")
    return found


def _layers(known: Mapping[str, Array], side: str) -> int:
    places = (re.match(rf"{side}/layer_(\d+)/", name) for name in known)
    return len({place[1] for place in places if place})


def _config(known: Mapping[str, Array], marks: Mapping[str, int]) -> dict[str, Any]:
    """The model's settings, read off the shapes."""
    vocabulary, width = known["decoder/embeddings/weight"].shape
    if int(known["decoder/activation"]) != _GELU or not int(known["decoder/pre_norm"]):
        raise ValueError("its blocks are not those of Whisper")
    end = marks["<|endoftext|>"]
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "dtype": "float16",
        "vocab_size": vocabulary,
        "d_model": width,
        "num_mel_bins": known["encoder/conv1/weight"].shape[1],
        "max_source_positions": known["encoder/position_encodings/encodings"].shape[0],
        "max_target_positions": known["decoder/position_encodings/encodings"].shape[0],
        **{f"{side}_layers": _layers(known, side) for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": int(known[f"{side}/num_heads"]) for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": known[f"{side}/layer_0/ffn/linear_0/bias"].size for side in ("encoder", "decoder")},
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": marks["<|startoftranscript|>"],
    }


def _generation(settings: Mapping[str, Any], marks: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, Any]:
    """How transcripts are written when nothing else is asked for."""
    languages = {name: place for name, place in marks.items() if place in settings["lang_ids"]}
    return {
        **{name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")},
        "alignment_heads": settings["alignment_heads"],
        "begin_suppress_tokens": settings["suppress_ids_begin"],
        "suppress_tokens": settings["suppress_ids"],
        "is_multilingual": True,
        "lang_to_id": languages,
        "task_to_id": {name: marks[f"<|{name}|>"] for name in ("transcribe", "translate")},
        "language": "<|en|>",
        "task": "transcribe",
        "no_timestamps_token_id": marks["<|notimestamps|>"],
        "prev_sot_token_id": marks["<|startofprev|>"],
        "return_timestamps": False,
        "max_initial_timestamp_index": 50,
        "max_length": config["max_target_positions"],
    }


def _merges(model: Mapping[str, Any]) -> list[list[str]]:
    """The pairs that make tokens, in their order. The packaged file lacks the first, so that no " the" would be made.

    Tokens 0 to 255 are single bytes, and each further one is what the next pair makes.
    """
    pairs = [each.split(" ") if isinstance(each, str) else list(each) for each in model["merges"]]
    made = sorted((place, token) for token, place in model["vocab"].items() if place >= _BYTES)
    if "".join(pairs[0]) == made[1][1]:
        pairs.insert(0, list(made[0][1]))
    if any(len(pair) != 2 or "".join(pair) != token for pair, (_, token) in zip(pairs, made, strict=False)):
        raise ValueError("its tokenizer's pairs do not make its tokens in their order")
    return pairs


def _extractor(bands: int) -> dict[str, Any]:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": bands,
        "sampling_rate": _RATE,
        "chunk_length": _WINDOW,
        "hop_length": _HOP,
        "n_fft": 400,
        "n_samples": _WINDOW * _RATE,
        "nb_max_frames": _WINDOW * _RATE // _HOP,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }


def _timestamps(first: int) -> list[dict[str, Any]]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return [{"id": first + at, "content": f"<|{at * _STEP:.2f}|>", **plain} for at in range(_TIMESTAMPS)]


_TOKENIZER = {
    "tokenizer_class": "WhisperTokenizer",
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "language": "english",
    "task": "transcribe",
    "model_max_length": 448,
    "add_prefix_space": True,  # as transcripts of the model itself begin
    "clean_up_tokenization_spaces": False,
}
