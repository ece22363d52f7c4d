"""Conversations that a chat template cannot take: which rows, why, and what of them is learned all the same."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from fedloom.client.data.chat import learned_spans
from fedloom.client.data.load import load_rows
from fedloom.client.data.records import Turns
from fedloom.client.data.rows import IGNORED
from fedloom.client.data.tokens import encode
from fedloom.client.doctor.data_report import Report, check
from fedloom.client.models.load import load_base
from fedloom.client.policy import Policy
from fedloom.client.tasks.api import task_named
from fedloom.core.config.file_format import Answers, Form
from fedloom.core.config.run import Spec
from fedloom.core.errors import DataError

# As Qwen3 does: what the model thought is written in the last answer alone, there always, and cut out of earlier ones.
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% if loop.last %}"
    "{{ '' if '</think>' in m['content'] else '<think></think>' }}{{ m['content'] }}{% else %}"
    "{{ m['content'].split('</think>')[-1] }}{% endif %}{% else %}{{ m['content'] }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As Gemma does.
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ONE: Turns = (("user", "the film"), ("assistant", "very good"))
SEVERAL: Turns = (*ONE, ("user", "plot"), ("assistant", "<think>hm</think>poor"), ("user", "thanks"))
SYSTEM: Turns = (("system", "be brief"), *ONE)


@pytest.fixture(scope="module")
def bases(small_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama with either template."""
    folders = {}
    for name, template in (("thinking", THINKING), ("no-system", NO_SYSTEM)):
        folders[name] = tmp_path_factory.mktemp(name)
        base, tokenizer, *_ = load_base(small_bases["llama"], task_named("causal-lm"))
        tokenizer.chat_template = template
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base.save_pretrained(folders[name])
            tokenizer.save_pretrained(folders[name])
    return folders


def tokenizer_of(base: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = load_base(base, task_named("instruct"))[1]
    return loaded


def write(folder: Path, *rows: Turns) -> str:
    path = folder / "talks.jsonl"
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) for turns in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def checked(policy: Policy, base: Path, source: str, answers: Answers = "all", private: bool = False) -> Report:
    data = {"source": source, "task": "instruct", "answers": answers, "declared_examples": 3, "labels": ()}
    policy = policy.model_copy(update={"data": policy.data.model_copy(update=data)})
    spec = Spec.model_validate(
        {
            "run": {"name": "chat", "rounds": 2},
            "model": {"base": str(base), "task": "instruct", "head": "frozen", "max_length": 64},
            "adapter": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
            "train": {"steps": 2, "sampling_rate": 0.5, "learning_rate": 0.5},
            "privacy": {"enabled": private, **({"noise_multiplier": 1.0, "epsilon": 50} if private else {})},
        }
    )
    return check(policy, spec)


CASES: list[tuple[str, Turns, str]] = [
    ("thinking", SEVERAL, 'add answers = "last" to [data]'),
    ("no-system", SYSTEM, "refuses a conversation (System role not supported)"),
]


@pytest.mark.parametrize(("base", "bad", "message"), CASES)
def test_a_check_counts_the_rows_and_names_the_first(
    base: str, bad: Turns, message: str, bases: dict[str, Path], policy: Policy, tmp_path: Path
) -> None:
    source = write(tmp_path, ONE, bad, (("user", "hi"), ONE[1]), bad)

    open_run, private = (checked(policy, bases[base], source, private=each) for each in (False, True))

    for level, report in (("error", open_run), ("warning", private)):
        (found,) = [text for kind, text in report.findings if kind == level and message in text]
        assert found.startswith(f"2 rows, the first at {source} line 2: ")
        assert report.lengths is not None
        assert (report.lengths.idle, report.lengths.longest > 1) == (0, True), "the other rows are counted as ever"
    assert json.loads(json.dumps(open_run.document()))["tokens"]["refused"]


def test_a_private_run_that_would_learn_nothing_at_all_is_an_error(
    bases: dict[str, Path], policy: Policy, tmp_path: Path
) -> None:
    report = checked(policy, bases["no-system"], write(tmp_path, SYSTEM), private=True)

    assert any("System role not supported" in text for kind, text in report.findings if kind == "error")


@pytest.mark.parametrize(("base", "bad", "message"), CASES)
def test_a_run_without_privacy_ends_with_the_line_and_a_private_one_goes_on(
    base: str, bad: Turns, message: str, bases: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = load_rows(write(tmp_path, ONE, bad, ONE), (), "train", "instruct")
    tokenizer = tokenizer_of(bases[base])

    with pytest.raises(DataError) as found:
        encode(rows, tokenizer, 64)
    assert message in str(found.value)
    assert f"1 of 3 rows, the first at {tmp_path}/talks.jsonl line 2: " in str(found.value)

    with caplog.at_level(logging.WARNING):
        encoded = encode(rows, tokenizer, 64, strict=False)
    assert [bool((targets == IGNORED).all()) for targets in encoded.targets] == [False, True, False]
    (told,) = [record.getMessage() for record in caplog.records if record.name.endswith("tokens")]
    assert "nothing is learned of 1 of 3 rows" in told


def test_the_last_answer_can_be_learned_under_any_template(
    bases: dict[str, Path], policy: Policy, tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(bases["thinking"])

    whole, spans = learned_spans(SEVERAL, tokenizer, "last")

    assert [whole[begin:end] for begin, end in spans] == ["<think>hm</think>poor<|end|>"]
    assert whole.startswith("<|user|>the film<|end|>\n<|assistant|>very good<|end|>\n"), "earlier turns are read"
    assert "thanks" not in whole, "nothing is learned from what follows"
    assert learned_spans(ONE, tokenizer, "last") == learned_spans(ONE, tokenizer)

    source = write(tmp_path, ONE, SEVERAL)
    rows = load_rows(source, (), "train", "instruct", Form(answers="last"))
    encoded = encode(rows.take(np.array([1])), tokenizer, 256)
    learned: Any = encoded.targets[0][encoded.targets[0] != IGNORED]
    assert tokenizer.decode(learned) == "<think>hm</think>poor<|end|>"
    assert checked(policy, bases["thinking"], source, "last").sound
