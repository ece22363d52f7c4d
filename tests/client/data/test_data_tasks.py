"""Rows and tokens of token-classification and causal-lm: what is read, what is learned, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from fedloom.client.data.load import load_rows
from fedloom.client.data.rows import IGNORED, Rows, digest, documents
from fedloom.client.data.survey import survey
from fedloom.client.data.tokens import collate, encode
from fedloom.client.tasks.api import task_named
from fedloom.core.config.file_format import Form
from fedloom.core.errors import DataError

LABELS = ("O", "PER")


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(small_bases: dict[str, Path]) -> PreTrainedTokenizerBase:
    from fedloom.client.models.load import load_base

    return load_base(small_bases["llama"], task_named("causal-lm"))[1]


def tokens_of(texts: list[list[str]], tags: list[list[int]]) -> Rows:
    count = len(texts)
    return Rows(
        tuple(" ".join(words) for words in texts),
        np.zeros(count, np.int64),
        ("",) * count,
        LABELS,
        "token-classification",
        words=tuple(map(tuple, texts)),
        tags=tuple(np.array(each) for each in tags),
    )


def language(*pairs: tuple[str, str]) -> Rows:
    texts, prompts = tuple(a + b for a, b in pairs), tuple(a for a, _ in pairs)
    return Rows(texts, np.zeros(len(pairs), np.int64), ("",) * len(pairs), (), "causal-lm", prompts=prompts)


def test_tagged_words_are_read(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.jsonl",
        {"tokens": ["Ada", "wrote"], "tags": ["PER", "O"], "group": "ward"},
        {"tokens": ["it"], "tags": ["O"], "id": 7},
    )

    rows = load_rows(source, LABELS, "train", "token-classification")

    assert (rows.texts, rows.words) == (("Ada wrote", "it"), (("Ada", "wrote"), ("it",)))
    assert [tags.tolist() for tags in rows.tags] == [[1, 0], [0]]
    assert (rows.groups, rows.label_names, rows.labels.tolist()) == (("ward", ""), LABELS, [0, 0])


def test_a_word_whose_tag_is_null_is_neither_learned_nor_scored(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = write(
        tmp_path / "a.jsonl",
        {"tokens": ["a", "b", "c"], "tags": [None, "PER", None]},
        {"tokens": ["a"], "tags": [None]},
    )
    rows = load_rows(source, LABELS, "train", "token-classification")

    assert [tags.tolist() for tags in rows.tags] == [[IGNORED, 1, IGNORED], [IGNORED]]
    assert [each["tags"] for each in documents(rows)] == [[None, "PER", None], [None]]
    learned = [targets[targets != IGNORED].tolist() for targets in encode(rows, tokenizer, 8).targets]
    assert learned == [[1], []]
    counted = survey(source, LABELS, "token-classification", Form())
    assert (counted.labels, counted.unknown, len(counted.usable)) == ({"PER": 1}, {}, 2)


def test_texts_and_prompts_are_read(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"text": "a film"}, {"prompt": "Q: ", "completion": "A", "group": "x"})
    (tmp_path / "b.csv").write_text('prompt,completion\n"Q, ",A\n')

    rows = load_rows(source, (), "train", "causal-lm")
    table = load_rows(str(tmp_path / "b.csv"), (), "train", "causal-lm")

    assert (rows.texts, rows.prompts, rows.groups) == (("a film", "Q: A"), ("", "Q: "), ("", "x"))
    assert (table.texts, table.prompts) == (("Q, A",), ("Q, ",))


@pytest.mark.parametrize("task", ["text-classification", "token-classification", "causal-lm"])
def test_documents_are_read_back_as_the_same_rows(task: str, tmp_path: Path) -> None:
    rows = {
        "text-classification": Rows(("a", "b"), np.array([1, 0]), ("", ""), LABELS),
        "token-classification": tokens_of([["a", "b"], ["c"]], [[0, 1], [1]]),
        "causal-lm": language(("", "a b"), ("c ", "d")),
    }[task]

    again = load_rows(write(tmp_path / "a.jsonl", *documents(rows)), rows.label_names, "train", task)

    assert (again.texts, again.words, again.prompts) == (rows.texts, rows.words, rows.prompts)
    assert again.labels.tolist() == rows.labels.tolist()
    assert [tags.tolist() for tags in again.tags] == [tags.tolist() for tags in rows.tags]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("token-classification", {"tokens": ["a"]}, "line 2 has no 'tags'; tokens and tags are needed"),
        ("token-classification", {"tokens": ["a"], "tags": ["O", "O"]}, "line 2 has 1 tokens and 2 tags"),
        ("token-classification", {"tokens": [], "tags": []}, "line 2: tokens must be a list of words"),
        ("token-classification", {"tokens": ["a", " "], "tags": ["O", "O"]}, "none of them empty"),
        ("token-classification", {"tokens": "a", "tags": ["O"]}, "tokens must be a list of words.*found a string"),
        ("token-classification", {"tokens": ["a"], "tags": "O"}, "tags must be a list with one label for each"),
        (
            "token-classification",
            {"tokens": ["a"], "tags": [True]},
            "a label must be a label's name or its index; found true or false",
        ),
        (
            "token-classification",
            {"tokens": ["a"], "tags": ["LOC"]},
            "line 2: a label is not among those expected; use 'O', 'P",
        ),
        ("token-classification", {"tokens": ["\ud800"], "tags": ["O"]}, "half of a surrogate pair"),
        ("token-classification", {"tokens": ["a"], "tags": ["O"], "text": "a"}, "both text and tokens; keep one"),
        (
            "text-classification",
            {"text": "a", "label": "O", "tokens": ["a"]},
            "both text and tokens.*one privacy account",
        ),
        ("causal-lm", {"text": "a", "prompt": "b", "completion": "c"}, "both text and prompt; keep one"),
        ("causal-lm", {"label": "a"}, "line 2 has no 'text'; text, or prompt and completion are needed"),
        ("causal-lm", {"prompt": "a"}, "line 2 has no 'completion'"),
        ("causal-lm", {"completion": "a"}, "line 2 has no 'prompt'"),
        ("causal-lm", {"prompt": "a", "completion": " "}, "line 2: the completion is empty"),
        ("causal-lm", {"prompt": 1, "completion": "a"}, "prompt must be a string; found a number"),
        ("causal-lm", {"text": ""}, "line 2: the text is empty"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(task: str, row: Any, message: str, tmp_path: Path) -> None:
    good = {
        "text-classification": {"text": "a", "label": "O"},
        "token-classification": {"tokens": ["a"], "tags": ["O"]},
        "causal-lm": {"text": "a"},
    }[task]

    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path / "a.jsonl", good, row), LABELS, "train", task)


def test_tags_in_a_csv_and_packaged_sources_for_other_tasks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("tokens,tags\na,O\n")

    with pytest.raises(DataError, match=r"lists, which a CSV file has no place for; write a \.jsonl or"):
        load_rows(str(tmp_path / "a.csv"), LABELS, "train", "token-classification")
    with pytest.raises(DataError, match="'sentiment' is for text-classification, not causal-lm"):
        load_rows("sentiment", (), "train", "causal-lm")


def test_columns_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(DataError, match="every word needs one tag"):
        tokens_of([["a", "b"]], [[0]])
    with pytest.raises(DataError, match="labels run from 0 to 2; 0 to 1 are allowed"):
        tokens_of([["a", "b"]], [[0, 2]])
    with pytest.raises(DataError, match="every text must begin with its prompt"):
        Rows(("a",), np.zeros(1, np.int64), ("",), (), "causal-lm", prompts=("b",))


def test_take_keeps_every_column() -> None:
    tagged, spoken = tokens_of([["a"], ["b", "c"]], [[0], [1, 0]]), language(("p", "q"), ("", "r"))

    assert tagged.take(np.array([1])).words == (("b", "c"),)
    assert tagged.take(np.array([1])).tags[0].tolist() == [1, 0]
    assert (spoken.take(np.array([0])).prompts, spoken.take(np.array([0])).task) == (("p",), "causal-lm")


def test_the_privacy_account_does_not_depend_on_task_prompt_or_tags() -> None:
    plain = Rows(("good film", "bad"), np.array([1, 0]), ("", ""), LABELS)

    same = [
        language(("", "good film"), ("", "bad")),
        language(("good ", "film"), ("b", "ad")),
        tokens_of([["good", "film"], ["bad"]], [[0, 0], [0]]),
        tokens_of([["good film"], ["bad"]], [[1], [1]]),
    ]

    assert {digest(rows) for rows in same} == {digest(plain)}


def test_the_first_token_of_a_word_has_its_tag(tokenizer: PreTrainedTokenizerBase) -> None:
    words = ["actor", "xyzzy", "good", "zqzq"]
    rows = tokens_of([words, ["good"]], [[1, 0, 1, 1], [1]])

    encoded = encode(rows, tokenizer, 64)

    pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    expected = [
        tag for piece, tag in zip(pieces, [1, 0, 1, 1], strict=True) for tag in [tag, *[IGNORED] * (len(piece) - 1)]
    ]
    assert max(map(len, pieces)) > 1
    assert encoded.input_ids[0].tolist() == [token for piece in pieces for token in piece]
    assert encoded.targets[0].tolist() == expected
    assert encode(rows, tokenizer, 8).targets[0].tolist() == expected[:8]


def test_every_token_but_the_first_is_learned_and_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode(language(("", "the good film")), tokenizer, 64)

    whole = [*tokenizer("the good film")["input_ids"], tokenizer.eos_token_id]
    assert encoded.input_ids[0].tolist() == whole
    assert encoded.targets[0].tolist() == [*whole[1:], IGNORED]


def test_the_prompt_is_read_but_not_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, completion = "the actor was ", "very good"
    encoded = encode(language((prompt, completion)), tokenizer, 64)

    ids, targets = encoded.input_ids[0].tolist(), encoded.targets[0].tolist()
    learned = [token for token in targets if token != IGNORED]
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion
    # A token that spans the border belongs to the completion: " very" here.
    assert tokenizer.decode(learned[:-1]).strip() == completion
    assert learned[-1] == tokenizer.eos_token_id
    assert targets[len(ids) - 1 - len(learned) : -1] == ids[-len(learned) :]


def test_a_cut_text_does_not_end_and_a_long_prompt_leaves_nothing(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    encoded = encode(language(("", "good film " * 30), ("bad plot " * 30, "great")), tokenizer, 8)

    assert [len(ids) for ids in encoded.input_ids] == [8, 8]
    assert encoded.targets[0].tolist() == [*encoded.input_ids[0][1:].tolist(), IGNORED]
    assert tokenizer.eos_token_id not in encoded.input_ids[0]
    assert (encoded.targets[1] == IGNORED).all()
    assert "1 of 2 examples have nothing to learn within model.max_length" in caplog.text


def test_an_end_token_that_the_tokenizer_adds_is_not_doubled(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode(language(("", "good</s>")), tokenizer, 64)

    assert encoded.input_ids[0].tolist().count(tokenizer.eos_token_id) == 1


def test_labels_are_padded_with_what_is_ignored(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode(language(("", "good"), ("", "the very good film")), tokenizer, 64)

    batch = collate(encoded, np.arange(2), 1)

    short, long = map(len, encoded.input_ids)
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape == (2, long)
    assert (batch["labels"][0, short:] == IGNORED).all()
    assert batch["attention_mask"][0].tolist() == [1] * short + [0] * (long - short)
    assert batch["labels"][1].tolist() == encoded.targets[1].tolist()


def test_a_row_without_a_token_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    class Mute:
        eos_token_id = None
        pad_token_id = 0

        def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[] for _ in texts], "offset_mapping": [[] for _ in texts]}

    with pytest.raises(
        DataError, match="1 of 1 rows, the first at example 1: it has no token under this model's tokenizer"
    ):
        encode(language(("", "\u200b")), Mute(), 8)
