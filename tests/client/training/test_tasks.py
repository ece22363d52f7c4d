"""Every task on BERT, GPT-2 and Llama: scores, evaluation, and an export that plain Hugging Face code loads."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from fedloom.client.data.rows import IGNORED, Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.eval.score import evaluate
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.loading import load_exported, predict
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.client.models.load import load_base, load_model
from fedloom.client.tasks.api import task_named
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ModelError
from fedloom.core.schema import Role

Build = Callable[..., AdapterModel]

CASES: list[tuple[str, str]] = [
    (architecture, task)
    for architecture in ("bert", "gpt2", "llama")
    for task in ("text-classification", "token-classification", "causal-lm")
    if (architecture, task) != ("bert", "causal-lm")
]
TEXTS = ("the good film", "a very bad plot and a sad actor", "great", "poor awful plot", "fine fine fine")


def rows_of(task: str) -> Rows:
    none, blank = np.zeros(5, np.int64), ("",) * 5
    if task == "text-classification":
        return Rows(TEXTS, np.array([0, 2, 1, 1, 0]), blank, ("O", "PER", "LOC"))
    if task == "causal-lm":
        return Rows(TEXTS, none, blank, (), task, prompts=("the ", "", "", "poor awful", "fine "))
    words = tuple(tuple(text.split()) for text in TEXTS)
    tags = tuple(np.arange(len(each)) % 3 for each in words)
    return Rows(TEXTS, none, blank, ("O", "PER", "LOC"), task, words=words, tags=tags)


@pytest.mark.parametrize(("architecture", "task"), CASES)
def test_an_examples_scores_do_not_depend_on_its_batch(architecture: str, task: str, build_task: Build) -> None:
    model = build_task(architecture, task)
    encoded, pad = encode(rows_of(task), model.tokenizer, 24), model.tokenizer.pad_token_id
    with torch.no_grad():
        together = model.logits(collate(encoded, np.arange(5), pad))
        alone = [model.logits(collate(encoded, np.array([i]), pad))[0] for i in range(5)]

    for row, scores in zip(together, alone, strict=True):
        torch.testing.assert_close(row[: len(scores)] if scores.dim() > 1 else row, scores, rtol=1e-4, atol=1e-4)
    classes = 3 if task != "causal-lm" else len(model.tokenizer)
    assert together.shape[-1] == classes
    assert together.dtype == torch.float32
    assert (Role.HEAD in model.schema.roles) == (task != "causal-lm")


@pytest.mark.parametrize(("architecture", "task"), CASES)
def test_evaluation_equals_a_loop_over_rows(architecture: str, task: str, build_task: Build) -> None:
    model = build_task(architecture, task)
    encoded, pad = encode(rows_of(task), model.tokenizer, 24), model.tokenizer.pad_token_id
    right, losses = [], []
    for row in range(5):
        batch = collate(encoded, np.array([row]), pad)
        with torch.no_grad():
            scores = model.logits(batch)[0]
        for score, label in zip(
            scores if task != "text-classification" else [scores], batch["labels"].reshape(-1), strict=True
        ):
            if label != IGNORED:
                right.append(bool(score.argmax() == label))
                losses.append(float(F.cross_entropy(score[None], label[None])))

    for size in (None, 2):
        score = evaluate(model, encoded, size)
        assert score.accuracy == pytest.approx(np.mean(right))
        assert score.loss == pytest.approx(np.mean(losses), rel=1e-4)
        assert score.examples == 5
    assert len(predict(model.model, model.task, encoded, pad)) == len(right)


PLAIN = {
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "causal-lm": AutoModelForCausalLM,
}


@pytest.mark.parametrize(("architecture", "task"), CASES)
def test_the_export_gives_the_same_scores_in_plain_hugging_face(
    architecture: str, task: str, build_task: Build, small_bases: dict[str, Path], tmp_path: Path
) -> None:
    model = build_task(architecture, task)
    encoded, pad = encode(rows_of(task), model.tokenizer, 24), model.tokenizer.pad_token_id
    labels = [] if task == "causal-lm" else ["O", "PER", "LOC"]

    save_adapter(model, tmp_path, {"run": "demo", "task": task, "labels": labels})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers and peft say about each other
        arguments = {"num_labels": 3} if labels else {}
        plain = PLAIN[task].from_pretrained(small_bases[architecture], **arguments)
        theirs = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    for row in range(5):
        batch = collate(encoded, np.array([row]), pad)
        with torch.no_grad():
            ours = model.logits(batch)
            other = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(other, ours, rtol=1e-4, atol=1e-4)
    card = (tmp_path / "README.md").read_text()
    assert f'{PLAIN[task].__name__}.from_pretrained("BASE"{", num_labels=3" if labels else ""})' in card
    reloaded = load_exported(small_bases[architecture], tmp_path, len(labels), task)
    np.testing.assert_array_equal(
        predict(reloaded, model.task, encoded, pad), predict(model.model, model.task, encoded, pad)
    )


def test_a_model_that_sees_what_it_must_predict_is_no_language_model(build_task: Build) -> None:
    with pytest.raises(ModelError, match="sees the tokens it is to predict; take a language model"):
        build_task("bert", "causal-lm")


def test_a_tokenizer_without_padding_gets_one_and_without_an_end_is_refused(
    small_bases: dict[str, Path], tmp_path: Path
) -> None:
    _, tokenizer, *_ = load_base(small_bases["gpt2"], task_named("text-classification", ("a", "b")))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None

    bare = Path(shutil.copytree(small_bases["gpt2"], tmp_path / "bare"))
    settings = bare / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"eos_token": "</s>"', '"eos_token": null'))
    with pytest.raises(ModelError, match="a padding or an end token; name one in"):
        load_base(bare, task_named("causal-lm"))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(small_bases: dict[str, Path], tmp_path: Path) -> None:
    larger = Path(shutil.copytree(small_bases["llama"], tmp_path / "larger"))
    _, tokenizer, *_ = load_base(larger, task_named("causal-lm"))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(larger)

    with pytest.raises(ModelError, match=r"has \d+ tokens, the model \d+; get files that fit"):
        load_base(larger, task_named("causal-lm"))


def test_an_adapter_without_a_tensor_is_refused(small_bases: dict[str, Path]) -> None:
    section = ModelSection(base=str(small_bases["llama"]), task="causal-lm", head="frozen")

    with pytest.raises(ModelError, match=r"has nothing that adapter\.kind = 'bias' trains; choose another kind"):
        load_model(section, AdapterSection(kind="bias", targets=("q_proj",)))
