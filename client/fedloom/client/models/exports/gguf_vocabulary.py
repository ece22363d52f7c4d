"""A tokenizer as llama.cpp knows one: tokens and their types, merges, special tokens, and how a text is split."""

import json
from dataclasses import dataclass
from typing import Any

from fedloom.core.errors import ModelError

__all__ = ["Vocabulary", "add_vocabulary", "read_vocabulary"]

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern by which Llama 3's tokenizer splits a text."""

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
"""llama.cpp's types of tokens."""


@dataclass(frozen=True)
class Vocabulary:
    """What tokenizer.ggml of a GGUF file says."""

    split: str
    """llama.cpp's name of the way a text is split before merging."""
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    """Ids of bos, eos, unk and pad, of those that there are."""
    adds: dict[str, bool]
    """Whether bos and eos are put around every text."""
    chat_template: str | None


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of a fast tokenizer of transformers.

    Args:
        tokenizer: A BPE of bytes, such as those of SmolLM2 and Llama 3.
        size: Rows of the model's embeddings; those beyond the tokenizer's tokens are unused.

    Raises:
        ModelError: It is of another kind, or splits texts in a way that llama.cpp has no name for here.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    split = _split(parts)
    tokens, types = [f"[PAD{index}]" for index in range(size)], [_UNUSED] * size
    added = tokenizer.added_tokens_decoder
    for token, index in tokenizer.get_vocab().items():
        if index >= size:
            raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, and the model {size}; it is another model's")
        tokens[index], types[index] = token, _NORMAL
        if index in added:
            types[index] = _CONTROL if added[index].special else _USER_DEFINED
    merges = [each if isinstance(each, str) else " ".join(each) for each in parts["model"]["merges"]]
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    around = tokenizer("a")["input_ids"]
    adds = {"bos": around[0] == ids["bos"], "eos": around[-1] == ids["eos"]}
    template = tokenizer.chat_template
    special = {name: index for name, index in ids.items() if index is not None}
    return Vocabulary(split, tokens, types, merges, special, adds, template if isinstance(template, str) else None)


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Put it into a file, by a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for a BPE of bytes
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.adds["bos"])
    writer.add_add_eos_token(vocabulary.adds["eos"])
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _split(parts: dict[str, Any]) -> str:
    """llama.cpp's name of the way a text is split, from tokenizer.json."""
    model, steps = parts["model"], parts["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    last = steps[-1]
    bytes_last = last.get("type") == "ByteLevel" and not last["add_prefix_space"]
    if model["type"] == "BPE" and parts["normalizer"] is None and bytes_last:
        first, whole = steps[:-1], last["use_regex"]
        merged_first = bool(model.get("ignore_merges"))  # whole tokens are looked up before anything is merged
        if whole and not first and not merged_first:
            return "gpt-2"
        if whole and first == [{"type": "Digits", "individual_digits": True}] and not merged_first:
            return "smollm"
        pattern = {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False}
        if not whole and first == [pattern] and merged_first:
            return "llama-bpe"
    raise ModelError(
        "format gguf is for byte-level BPE tokenizers that split texts as those of GPT-2, SmolLM2 or Llama 3 do, and "
        f"this one is {model['type']} with {' and '.join(str(each.get('type')) for each in steps)}; export with format "
        "merged, and convert that with llama.cpp's convert_hf_to_gguf.py"
    )
