"""A Whisper model in CTranslate2's form becomes a folder that transformers loads, value for value."""

import json
import struct
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoTokenizer, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from fedloom.client.assets.fetch import ASSETS, cache_dir
from fedloom.client.assets.whisper import variables, whisper
from fedloom.core.errors import DataError

Array = npt.NDArray[Any]
Values = dict[str, Array]

MARKS = (
    *("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|fi|>"),
    *("<|transcribe|>", "<|translate|>", "<|startofprev|>", "<|notimestamps|>"),
)
PAIRS = (("Ġ", "t"), ("h", "e"), ("Ġt", "he"))
"""What makes tokens 256, 257 and 258."""
NUMBERS = {np.dtype("<f4"): 0, np.dtype("<i1"): 1, np.dtype("<i2"): 2, np.dtype("<f2"): 4}


def letters() -> list[str]:
    """The 256 characters that stand for bytes, in the order of tokens."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [each for each in range(256) if each not in plain]
    return [chr(each) for each in plain] + [chr(256 + place) for place in range(len(other))]


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def binary(values: Values, aliases: dict[str, str], spec: str = "WhisperSpec") -> bytes:
    """A model.bin as CTranslate2 writes it."""
    parts = [struct.pack("<I", 6), text(spec), struct.pack("<II", 3, len(values))]
    for name, value in values.items():
        head = text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        parts += [head, struct.pack("<BI", NUMBERS[value.dtype], value.nbytes), value.tobytes()]
    parts.append(struct.pack("<I", len(aliases)))
    parts += [text(alias) + text(name) for alias, name in aliases.items()]
    return b"".join(parts)


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    size = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 4}
    vocabulary = 256 + len(PAIRS) + 1 + len(MARKS) + 1501
    wide = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "vocab_size": vocabulary}
    wide |= {"pad_token_id": 260, "bos_token_id": 260, "eos_token_id": 260, "decoder_start_token_id": 261}
    config = WhisperConfig(
        **size, **wide, init_std=0.3, max_target_positions=20, max_source_positions=1500, num_mel_bins=8
    )
    made = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, each in made.named_parameters():
            if name.endswith("bias") or "norm" in name:
                each.normal_(std=0.3)
            each.copy_(each.half())
    return made


def fused(model: WhisperForConditionalGeneration) -> Values:
    """The model's values by CTranslate2's names."""
    state = {name: each.half().numpy() for name, each in model.model.state_dict().items()}
    found: Values = {
        "decoder/activation": np.array(3, "<i1"),
        "decoder/pre_norm": np.array(1, "<i1"),
        "decoder/embeddings/weight": state["decoder.embed_tokens.weight"],
    }
    for kind in ("weight", "bias"):
        found |= {f"encoder/conv{at}/{kind}": state[f"encoder.conv{at}.{kind}"] for at in (1, 2)}

    def put(theirs: str, *ours: str) -> None:
        for kind in ("weight", "bias"):
            empty = np.zeros(model.config.d_model, np.float16)
            found[f"{theirs}/{kind}"] = np.concatenate([state.get(f"{each}.{kind}", empty) for each in ours])

    def norm(theirs: str, ours: str) -> None:
        found[f"{theirs}/gamma"], found[f"{theirs}/beta"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    for side, heads, count in (("encoder", 2, 2), ("decoder", 4, 3)):
        found[f"{side}/num_heads"] = np.array(heads, "<i2")
        found[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for at in range(count):
            theirs, ours = f"{side}/layer_{at}", f"{side}.layers.{at}"
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            put(f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{each}_proj" for each in "qkv"))
            put(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            if side == "decoder":
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                put(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                put(f"{theirs}/attention/linear_1", *(f"{ours}.encoder_attn.{each}_proj" for each in "kv"))
                put(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            put(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            put(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    return found


ALIASES = {"decoder/projection/weight": "decoder/embeddings/weight"}


def packaged(folder: Path, data: bytes, *, first_pair: bool = False) -> Path:
    """A package's files; the model in two parts. Returns the first."""
    folder.mkdir()
    (folder / "model.bin.part1").write_bytes(data[: len(data) // 2])
    (folder / "model.bin.part2").write_bytes(data[len(data) // 2 :])
    tokens = [*letters(), *("".join(pair) for pair in PAIRS), ""]
    marks = {mark: len(tokens) + place for place, mark in enumerate(MARKS)}
    added = [{"id": place, "content": mark, "special": True} for mark, place in marks.items()]
    added = [{**each, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)} for each in added]
    pairs = [" ".join(pair) for pair in (PAIRS if first_pair else PAIRS[1:])]
    bpe = {"type": "BPE", "vocab": {token: place for place, token in enumerate(tokens)}, "merges": pairs}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": bpe}))
    settings = {"lang_ids": [marks["<|en|>"], marks["<|fi|>"]], "alignment_heads": [[1, 0]]}
    settings |= {"suppress_ids": [1, 2], "suppress_ids_begin": [220]}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder / "model.bin.part1"


@pytest.mark.parametrize("first_pair", [False, True], ids=["without the first pair", "whole"])
def test_a_model_and_its_tokenizer_are_rebuilt(
    model: WhisperForConditionalGeneration, tmp_path: Path, first_pair: bool
) -> None:
    whisper(packaged(tmp_path / "package", binary(fused(model), ALIASES), first_pair=first_pair), tmp_path / "made")

    made = tmp_path / "made"
    assert {path.name for path in made.iterdir()} == set(ASSETS["whisper-base"].files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = WhisperForConditionalGeneration.from_pretrained(made, dtype=torch.float32).eval()
    features, ids = torch.randn(2, 8, 3000), torch.randint(250, (2, 7))
    with torch.no_grad():
        expected = model(input_features=features, decoder_input_ids=ids).logits
        torch.testing.assert_close(again(input_features=features, decoder_input_ids=ids).logits, expected)
    assert WhisperFeatureExtractor.from_pretrained(made).n_samples == 480_000
    tokenizer = AutoTokenizer.from_pretrained(made)
    begin, end = [261, 262, 264, 267], 260
    assert tokenizer("the").input_ids == [*begin, 258, end]  # " the", made by the pair that the package lacks
    assert tokenizer.convert_tokens_to_ids(["<|0.00|>", "<|30.00|>"]) == [268, 1768]
    assert again.generation_config.lang_to_id == {"<|en|>": 262, "<|fi|>": 263}
    written = again.generate(features, max_new_tokens=3)
    assert tokenizer.decode(written[0]) is not None


def changed(values: Values, name: str, value: Array) -> Values:
    return {**values, name: value}


def refused() -> Iterator[tuple[str, Callable[[Values], bytes], str]]:
    yield "another model", lambda v: binary(v, ALIASES, "TransformerSpec"), "holds 'TransformerSpec' in version 6"
    yield "cut off", lambda v: binary(v, ALIASES)[:-9], "it ends .* bytes too early"
    yield "goes on", lambda v: binary(v, ALIASES) + b"more", "4 bytes follow its end"
    yield "alias of nothing", lambda v: binary(v, {"decoder/projection/weight": "no"}), "stands for no, which is not"
    yield (
        "own output layer",
        lambda v: binary(v | {"decoder/projection/weight": v["decoder/embeddings/weight"]}, {}),
        ("its output layer has weights of its own"),
    )
    key = "encoder/layer_0/self_attention/linear_0/bias"
    yield "keys with a bias", lambda v: binary(changed(v, key, v[key] + 1), ALIASES), r"k_proj\.bias is not zero"
    yield (
        "another activation",
        lambda v: binary(changed(v, "decoder/activation", np.array(0, "<i1")), ALIASES),
        ("its blocks are not those of Whisper"),
    )
    yield "a tensor too few", lambda v: binary({n: e for n, e in v.items() if n != key}, ALIASES), key
    yield (
        "fewer tokens",
        (lambda v: binary(changed(v, "decoder/embeddings/weight", v["decoder/embeddings/weight"][:-1]), ALIASES)),
        "has not 1768 tokens",
    )


@pytest.mark.parametrize(("make", "message"), [each[1:] for each in refused()], ids=[each[0] for each in refused()])
def test_other_files_are_refused(
    model: WhisperForConditionalGeneration, tmp_path: Path, make: Callable[[Values], bytes], message: str
) -> None:
    with pytest.raises(DataError, match=f"model.bin.part1 does not hold a Whisper model as expected: .*{message}"):
        whisper(packaged(tmp_path / "package", make(fused(model))), tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_no_size_that_a_file_claims_is_believed() -> None:
    head = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 1) + text("a")

    def of(rank: int, *numbers: int, kind: int = 0, size: int = 4) -> bytes:
        return head + struct.pack(f"<B{len(numbers)}IBI", rank, *numbers, kind, size)

    for data, message in (
        (of(1, 2**30 - 1, size=2**32 - 4), "it ends"),
        (of(2, 2**31, 2**31, size=4), "4 bytes, which is not what shape"),
        (of(200, *[1] * 200), "200 dimensions"),
        (of(1, 1, kind=5), "of type 5"),
        (b"\x06", "it ends"),
        (struct.pack("<IH", 6, 60000), "it ends"),
    ):
        with pytest.raises(ValueError, match=message):
            variables(data)


# What CTranslate2 4.8.5 makes of the packaged files and of `chirp`, in float32.
POSITIONS, PLACES = (0, 50, 200, 249, 1499), (0, 100, 300, 511)
ENCODED = [
    [-1.1215, 0.0849, -0.0964, 0.6118],
    [-1.2889, 0.6068, 0.3418, -0.0325],
    [-0.9715, -0.2086, -0.6827, -0.7959],
    [-1.2270, -0.0972, -0.1585, 0.2148],
    [-0.8775, -0.6380, 0.5248, -1.1967],
]
TOKENS, LOGITS = (291, 467, 1441, 50363), [-0.1394, -2.8357, -9.5198, -5.7773]


def chirp() -> npt.NDArray[np.float32]:
    """Five seconds of a tone that rises and swells."""
    at = np.arange(80_000) / 16_000
    tone = 0.3 * np.sin(2 * np.pi * (200 * at + 150 * at**2)) * (1 + np.sin(2 * np.pi * 3 * at))
    return np.asarray(tone, np.float32)


@pytest.mark.skipif(not (cache_dir() / "whisper-base").is_dir(), reason="needs `fedloom assets whisper-base`")
def test_the_packaged_model_computes_what_ctranslate2_does() -> None:
    folder = cache_dir() / "whisper-base"
    whole = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    features = torch.from_numpy(extractor(chirp(), sampling_rate=16_000, return_tensors="np")["input_features"])
    with torch.no_grad():
        encoded = whole.model.encoder(features).last_hidden_state[0].numpy()
        begin = torch.tensor([[50258, 50259, 50359, 50363]])
        logits = whole(input_features=features, decoder_input_ids=begin).logits[0, -1].numpy()

    np.testing.assert_allclose(encoded[np.ix_(POSITIONS, PLACES)], ENCODED, atol=2e-3)
    np.testing.assert_allclose(logits[list(TOKENS)], LOGITS, atol=1e-3)


@pytest.mark.skipif(not (cache_dir() / "whisper-base").is_dir(), reason="needs `fedloom assets whisper-base`")
def test_the_packaged_tokenizer_makes_the_tokens_that_the_model_was_trained_on() -> None:
    """Byte pairs by the ranks of the vocabulary, as OpenAI's own code does, without the list of pairs."""
    tokenizer = AutoTokenizer.from_pretrained(cache_dir() / "whisper-base")
    ranks = {token: place for token, place in tokenizer.get_vocab().items() if place < 50257}

    def merged(word: str) -> list[int]:
        parts = list(word)
        while True:
            found = [(ranks.get(a + b, 1 << 30), at) for at, (a, b) in enumerate(pairwise(parts))]
            if not found or min(found)[0] == 1 << 30:
                return [ranks[part] for part in parts]
            at = min(found)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    for sentence in ("It was the best of times, it was the worst of times.", "metoprolol 12.5 mg PO BID"):
        words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(f" {sentence}")]
        expected = [token for word in words for token in merged(word)]
        assert tokenizer(sentence).input_ids == [50258, 50259, 50359, 50363, *expected, 50257]
        assert tokenizer.decode(expected) == f" {sentence}"
