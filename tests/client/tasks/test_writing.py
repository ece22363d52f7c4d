"""What a model writes in answer to held-out rows: greedy, the same in any batch, and compared as papers do."""

import io
import json
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AddedToken

from fedloom.client.data.load import load_rows
from fedloom.client.data.tokens import Encoded, collate, encode
from fedloom.client.eval.score import evaluate
from fedloom.client.eval.text_figures import Written, speech_figures, text_figures
from fedloom.client.eval.writing import _given, _special, written
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.load import load_model
from fedloom.core.config.parsing import parse
from fedloom.core.config.run import AdapterSection, ModelSection, RunConfig
from fedloom.core.errors import ConfigError, DataError
from tests.conftest import byte_tokenizer
from tests.families import save_family
from tests.simulation.end_to_end.test_every_task import llava

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CASES = {
    "causal-lm-llama": ("causal-lm", "llama"),
    "causal-lm-gpt2": ("causal-lm", "gpt2"),
    "instruct": ("instruct", "qwen2"),
    "seq2seq-t5": ("seq2seq", "t5"),
    "seq2seq-bart": ("seq2seq", "bart"),
    "speech-recognition": ("speech-recognition", "whisper"),
    "image-text": ("image-text", "llava"),
}
TEXTS = [("good film", " very great"), ("a plot", " sad"), ("the bad actor said so:", " no"), ("very", " very very")]


def recording(number: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as written_to:
        written_to.setnchannels(1)
        written_to.setsampwidth(2)
        written_to.setframerate(16000)
        tone = 8000 * np.sin(np.arange(4000) * (0.05 + 0.1 * number))
        written_to.writeframes(tone.astype(np.int16).tobytes())
    return file.getvalue()


def data(task: str, folder: Path) -> Path:
    """Four rows to train on and to be scored on."""
    folder.mkdir()
    made: list[dict[str, Any]] = []
    for number, (prompt, completion) in enumerate(TEXTS):
        row: dict[str, Any] = {"prompt": prompt, "completion": completion}
        if task == "speech-recognition":
            row = {"audio": f"{number}.wav", "text": completion.strip()}
            (folder / row["audio"]).write_bytes(recording(number))
        if task == "image-text":
            row["image"] = f"{number}.png"
            Image.new("RGB", (28, 28), (60 * number, 90, 20)).save(folder / row["image"])
        made.append(row)
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


@pytest.fixture(scope="module", params=CASES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[AdapterModel, Encoded]:
    task, family = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    base = llava(folder / "base") if family == "llava" else save_family(family, folder / "base")
    if family == "bart":  # at the end of what it may write its configuration forces a token, which is none of these
        known = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(known | {"forced_eos_token_id": 1}))
    if task == "instruct":
        settings = json.loads((base / "tokenizer_config.json").read_text())
        (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    section = ModelSection.model_validate({"base": str(base), "task": task, "max_length": 48, "head": "frozen"})
    model = load_model(section, AdapterSection(rank=2, targets="all-linear"))
    values = {spec.name: np.random.default_rng(3).normal(0, 0.3, spec.shape) for spec in model.schema.tensors}
    model.load({name: each.astype(np.float32) for name, each in values.items()})
    rows = load_rows(str(data(task, folder / "data")), (), "test", task)
    return model, encode(rows, model.tokenizer, 48)


def greedy(model: AdapterModel, encoded: Encoded, row: int) -> str:
    """The likeliest token after all that is known, again and again, by whole forward passes of this row alone."""
    alone = replace(encoded, labels=encoded.labels[:1], media=encoded.media[row : row + 1])
    ids, targets = list(encoded.input_ids[row : row + 1]), encoded.targets[row]
    decoder, ends = model.task.traits.decoder, {model.tokenizer.eos_token_id}
    if decoder:
        known = [each for each in targets[:2].tolist() if each in model.tokenizer.all_special_ids and each not in ends]
    else:
        known = ids[0][: int(np.flatnonzero(targets >= 0)[0]) + 1].tolist()
    given = len(known)
    # BART's configuration forces the end where no more may be written.
    forced = getattr(model.model.get_base_model().generation_config, "forced_eos_token_id", None) is not None
    while len(known) < 48 - decoder - forced:
        if decoder:
            one = replace(alone, input_ids=tuple(ids), targets=(np.array([*known, 0], np.int32),))
        else:
            one = replace(alone, input_ids=(np.array(known, np.int32),), targets=(np.array(known, np.int32),))
        with torch.inference_mode():
            scores = model.logits(collate(one, np.array([0]), model.tokenizer.pad_token_id))
        token = int(scores[0, len(known) - (not decoder)].argmax())
        if token in ends:
            break
        known.append(token)
    return str(model.tokenizer.decode(known[given:], skip_special_tokens=True)).strip()


def test_what_is_written_is_the_likeliest_token_after_each_other_one(loaded: tuple[AdapterModel, Encoded]) -> None:
    model, encoded = loaded

    found = written(model, encoded, 4)

    wanted = [completion.strip() for _, completion in TEXTS]
    assert [each.wanted for each in found] == wanted
    assert [each.written for each in found] == [greedy(model, encoded, row) for row in range(4)]
    assert any(each.written for each in found)
    assert [each.written for each in written(model, encoded, 1)] == [found[0].written]


def test_special_tokens_before_a_text_are_given_to_the_model() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|en|>", special=True)])  # without a role, as Whisper's languages are
    tokenizer.add_tokens([AddedToken("<|0.00|>", special=False)])
    begin, english, clock, end = (
        tokenizer.convert_tokens_to_ids(each) for each in ("<s>", "<|en|>", "<|0.00|>", "</s>")
    )
    assert english not in tokenizer.all_special_ids
    text, special = tokenizer("film")["input_ids"], _special(tokenizer) - {end}

    def given(*before: int) -> int:
        return _given(np.array([*before, *text, end], np.int32), special)

    assert [given(), given(english), given(begin, english), given(english, clock)] == [0, 1, 2, 1]
    assert _given(np.array([end], np.int32), special) == 0  # an empty text is the model's to end


def test_nothing_is_said_beside_what_is_written(
    loaded: tuple[AdapterModel, Encoded], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    model, encoded = loaded
    written(model, encoded, 2)

    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_an_evaluation_has_the_figures_of_what_was_written(loaded: tuple[AdapterModel, Encoded]) -> None:
    model, encoded = loaded

    score = evaluate(model, encoded, generate=3)

    names = {"wer", "cer"} if model.task.traits.audio else {"rouge1", "rouge2", "rouge_l"}
    assert names | {"exact_match"} <= set(score.metrics)
    assert len(score.texts) == 3
    assert "exact_match" not in evaluate(model, encoded).metrics
    assert evaluate(model, encoded).texts == ()


def test_the_last_answer_of_a_conversation_is_written(tmp_path: Path) -> None:
    base = save_family("llama", tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    section = ModelSection.model_validate({"base": str(base), "task": "instruct", "max_length": 96, "head": "frozen"})
    model = load_model(section, AdapterSection(rank=2))
    said = [("user", "good"), ("assistant", "film"), ("user", "bad"), ("assistant", "plot")]
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    encoded = encode(load_rows(str(tmp_path / "rows.jsonl"), (), "train", "instruct"), model.tokenizer, 96)

    assert [each.wanted for each in written(model, encoded, 5)] == ["plot"]


def test_texts_without_prompts_ask_for_nothing(tmp_path: Path) -> None:
    section = ModelSection.model_validate(
        {"base": str(save_family("gpt2", tmp_path / "base")), "task": "causal-lm", "max_length": 48, "head": "frozen"}
    )
    model = load_model(section, AdapterSection(rank=2))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a good film"}) + "\n")
    encoded = encode(load_rows(str(tmp_path / "rows.jsonl"), (), "train", "causal-lm"), model.tokenizer, 48)

    with pytest.raises(DataError, match="no held-out row has one"):
        evaluate(model, encoded, generate=2)


def test_a_task_that_writes_nothing_is_not_asked_to() -> None:
    tables: dict[str, Any] = {
        "run": {"name": "a", "rounds": 1},
        "model": {"base": "x", "labels": ["a", "b"]},
        "train": {"steps": 1, "sampling_rate": 0.1, "learning_rate": 0.1},
        "evaluation": {"generate": 5},
    }

    with pytest.raises(ConfigError, match=r"evaluation\.generate = 5 .* in text-classification it writes none"):
        parse(RunConfig, tables, (), source="run.toml")


def test_figures_of_texts_are_those_of_the_papers() -> None:
    pairs = [Written("the cat sat on the mat", "the cat lay on a mat"), Written("quiet ward", "quiet ward")]

    found = text_figures(pairs)

    # the, cat, on, mat of six; "the cat" of five pairs; the longest common subsequence is "the cat on mat".
    assert found == pytest.approx(
        {"rouge1": (4 / 6 + 1) / 2, "rouge2": 0.6, "rouge_l": (4 / 6 + 1) / 2, "exact_match": 0.5}
    )


def test_errors_of_speech_are_counted_over_all_wanted_words() -> None:
    pairs = [Written("ten past nine", "ten past"), Written("go", "go on now")]

    found = speech_figures(pairs)

    assert found["wer"] == pytest.approx((1 + 2) / 4)
    assert found["cer"] == pytest.approx((5 + 7) / 15)
    assert speech_figures([Written("", "x")]) == {"exact_match": 0.0}
