"""Instruction tuning: what of a conversation is learned, under templates of several forms, and what is refused."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from fedloom.client.data.chat import learned_spans
from fedloom.client.data.records import Turns
from fedloom.client.data.rows import IGNORED, Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.base_folder import base_digest
from fedloom.client.models.load import load_base, load_model
from fedloom.client.policy import Policy
from fedloom.client.privacy.auditing.audit import _through_the_model
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.tasks.api import task_named
from fedloom.client.training.losses import per_example
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import ModelSection, Spec
from fedloom.core.errors import DataError, ModelError

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|sys|>be kind<|end|>\n{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = "{% for m in messages %}{% if loop.last %}<|{{ m['role'] }}|>{% endif %}{{ m['content'] }}{% endfor %}"
PICKY = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('no: ' + messages[0]['content']) }}{% endif %}x"

TALK: Turns = (("user", "the film"), ("assistant", "very good"), ("user", "plot"), ("assistant", "poor"))


@pytest.fixture(scope="module")
def chat_base(small_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    base, tokenizer, *_ = load_base(small_bases["llama"], task_named("causal-lm"))
    tokenizer.chat_template = CHATML
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(chat_base: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = load_base(chat_base, task_named("instruct"))[1]
    return loaded


def rows_of(*turns: Turns) -> Rows:
    texts = tuple("".join(content for _, content in each) for each in turns)
    count = len(turns)
    return Rows(texts, np.zeros(count, np.int64), ("",) * count, (), "instruct", turns=turns)


def test_the_assistants_turns_are_learned_with_their_end_and_nothing_else(tokenizer: PreTrainedTokenizerBase) -> None:
    whole, spans = learned_spans(TALK, tokenizer)

    assert [whole[begin:end] for begin, end in spans] == ["very good<|end|>", "poor<|end|>"]
    assert whole == tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in TALK], tokenize=False
    )


def test_targets_are_the_next_tokens_of_the_assistant(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode(rows_of(TALK), tokenizer, 512)

    ids, targets = encoded.input_ids[0], encoded.targets[0]
    learned = targets != IGNORED
    np.testing.assert_array_equal(targets[learned], ids[1:][learned[:-1]])
    assert tokenizer.decode(targets[learned]) == "very good<|end|>poor<|end|>"
    assert tokenizer.decode(ids) == learned_spans(TALK, tokenizer)[0], "no special token is added a second time"
    assert targets[-1] == IGNORED


def test_a_conversation_is_cut_at_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    full, cut = (encode(rows_of(TALK), tokenizer, length) for length in (512, 40))

    assert len(cut.input_ids[0]) == 40
    np.testing.assert_array_equal(cut.input_ids[0], full.input_ids[0][:40])
    np.testing.assert_array_equal(cut.targets[0][:39], full.targets[0][:39])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (FORGETFUL, 'give each row one assistant\'s turn, the last, or add answers = "last"'),
        (PICKY, r"refuses a conversation \(TemplateError\)"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_without_quoting_the_row(
    template: str, message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = template

    with pytest.raises(DataError, match=message) as found:
        encode(rows_of((("system", "secret"), *TALK)), tokenizer, 64)

    assert "secret" not in str(found.value)


def test_a_base_without_a_template_is_refused(small_bases: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="has no chat template; take an instruct model, or task causal-lm"):
        load_base(small_bases["llama"], task_named("instruct"))


def test_the_template_is_part_of_the_digest(chat_base: Path, tmp_path: Path) -> None:
    for path in chat_base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert base_digest(tmp_path) == base_digest(chat_base)
    (template,) = tmp_path.glob("*.jinja")
    template.write_text(CHATML + " ")

    assert base_digest(tmp_path) != base_digest(chat_base)


SPEC: dict[str, Any] = {
    "run": {"name": "chat", "rounds": 2},
    "adapter": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
    "train": {"steps": 2, "sampling_rate": 0.5, "learning_rate": 0.5, "microbatch": 2},
    "privacy": {"noise_multiplier": 1.0, "epsilon": 50, "clip_norm": 0.7},
}


@pytest.fixture
def spec(chat_base: Path) -> Spec:
    section = {"base": str(chat_base), "task": "instruct", "head": "frozen", "max_length": 64}
    return Spec.model_validate({**SPEC, "model": section})


@pytest.fixture
def model(spec: Spec) -> AdapterModel:
    loaded = load_model(spec.model, spec.adapter)
    rng = np.random.default_rng(1)
    loaded.load({s.name: rng.normal(0, 0.3, s.shape).astype(np.float32) for s in loaded.schema.tensors})
    return loaded


LONG: Turns = (("user", "hi"), ("assistant", "very very good film and great plot and happy actor"))


def test_one_row_is_one_example_with_the_mean_over_its_own_answers(model: AdapterModel) -> None:
    """A long conversation moves no other's gradient, and each is what it would be alone."""
    rows = rows_of(TALK, LONG, TALK[:2])
    encoded, pad = encode(rows, model.tokenizer, 64), model.tokenizer.pad_token_id
    parameters = model.trainable(model.schema.roles)
    alone, losses = [], []
    for row in range(3):
        batch = collate(encoded, np.array([row]), pad)
        scores, labels = model.logits(batch)[0], batch["labels"][0]
        loss = F.cross_entropy(scores[labels != IGNORED], labels[labels != IGNORED])  # the mean of its own tokens
        alone.append(torch.cat([each.reshape(-1) for each in torch.autograd.grad(loss, parameters)]))
        losses.append(loss.item())

    batch = collate(encoded, np.arange(3), pad)
    with recording(model.model, parameters) as tape:
        tape.begin(3)
        each = per_example(model.logits(batch), batch["labels"])
        torch.autograd.backward(each.sum())
        tape.finish()
        taped = tape.flat.clone()

    assert each.tolist() == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(taped, torch.stack(alone), rtol=1e-3, atol=1e-5)


def test_a_private_trainer_takes_conversations(model: AdapterModel, spec: Spec, policy: Policy, tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger", "sha256:" + "0" * 64) as ledger:
        trainer = Trainer(model, rows_of(TALK, LONG), spec, policy, ledger)

    assert model.probed
    assert len(trainer.encoded) == 2


def test_the_audit_takes_a_run_on_conversations(model: AdapterModel, spec: Spec) -> None:
    assert _through_the_model(model, spec, Seeded(1), 1e-3, 0.99).verdict == "consistent"


def test_rows_of_conversations_need_their_turns() -> None:
    with pytest.raises(DataError, match="1 turns for 2 texts"):
        Rows(("a", "b"), np.zeros(2, np.int64), ("", ""), (), "instruct", turns=(TALK,))


def test_the_tasks_sections_are_checked() -> None:
    for section, message in (
        ({"task": "instruct"}, "instruct adds no head"),
        ({"task": "instruct", "head": "frozen", "labels": ("a", "b")}, "instruct has none"),
        ({"labels": ("a", "b"), "image_size": 56}, "image_size is for images"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelSection.model_validate({"base": "x", **section})
