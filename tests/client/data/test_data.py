from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fedloom.client.assets.fetch import fetch
from fedloom.client.data.rows import Rows, digest
from fedloom.client.data.tokens import Encoded, collate, encode, microbatches
from fedloom.core.errors import ConfigError, DataError

ROWS = Rows(("good", "bad", "good"), np.array([1, 0, 1]), ("x", "y", "x"), ("negative", "positive"))


def encoded_of(lengths: list[int]) -> Encoded:
    ids = tuple(np.arange(1, length + 1, dtype=np.int32) for length in lengths)
    return Encoded(ids, np.arange(len(lengths), dtype=np.int64))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(fetch("minilm-l6")))


def test_take_keeps_the_given_order() -> None:
    taken = ROWS.take(np.array([1, 0]))

    assert (taken.texts, taken.groups, taken.labels.tolist()) == (("bad", "good"), ("y", "x"), [0, 1])
    assert len(ROWS.take(np.array([], np.int64))) == 0


def test_rows_refuse_columns_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="3 texts with labels of shape"):
        replace(ROWS, labels=np.array([0]))
    with pytest.raises(DataError, match="1 groups"):
        replace(ROWS, groups=("x",))
    with pytest.raises(DataError, match="labels run from 0 to 2; 0 to 1 are allowed"):
        replace(ROWS, labels=np.array([0, 2, 1]))


@given(st.permutations(range(3)))
def test_digest_ignores_order_labels_and_groups(order: list[int]) -> None:
    other = replace(ROWS.take(np.array(order)), labels=np.array([0, 0, 0]), groups=("", "", ""), label_names=("a",))

    assert digest(other) == digest(ROWS)


def test_digest_sees_texts_and_how_often_they_occur() -> None:
    others = [ROWS.take(np.array(rows)) for rows in ([0, 1], [0, 1, 1], [0, 2], [0, 0, 0, 1])]
    joined = replace(ROWS, texts=("goodbad", "", "good"))

    assert len({digest(rows) for rows in [ROWS, *others, joined]}) == 6


def test_encode_truncates_and_keeps_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = Rows(("a fine film", "dull " * 50), np.array([1, 0]), ("", ""), ("negative", "positive"))

    encoded = encode(rows, tokenizer, 8)

    assert [len(ids) for ids in encoded.input_ids] == [5, 8]
    assert all(ids.dtype == np.int32 for ids in encoded.input_ids)
    assert all((ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id) for ids in encoded.input_ids)
    assert tokenizer.decode(encoded.input_ids[0], skip_special_tokens=True) == "a fine film"
    assert encoded.labels.tolist() == [1, 0]


def test_encode_gives_every_row_its_own_ids_across_chunks(tokenizer: PreTrainedTokenizerBase) -> None:
    count = 1500
    texts = tuple(f"row {i}" for i in range(count))
    encoded = encode(Rows(texts, np.zeros(count, np.int64), ("",) * count, ("only",)), tokenizer, 16)

    assert len(encoded) == count
    assert [tokenizer.decode(encoded.input_ids[i], skip_special_tokens=True) for i in (0, 1023, 1024, 1499)] == [
        "row 0",
        "row 1023",
        "row 1024",
        "row 1499",
    ]


def test_collate_pads_to_the_longest_of_the_batch() -> None:
    batch = collate(encoded_of([2, 9, 3]), np.array([2, 0]), pad_id=7)

    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 2, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [2, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 12), st.data())
def test_microbatches_cover_the_batch_once_from_short_to_long(
    lengths: list[int], size: int, data: st.DataObject
) -> None:
    encoded = encoded_of(lengths)
    drawn = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1))))

    pieces = list(microbatches(np.array(drawn, np.int64), encoded, size))

    flat = [int(i) for piece in pieces for i in piece]
    assert sorted(flat) == drawn
    assert [lengths[i] for i in flat] == sorted(lengths[i] for i in drawn)
    assert all(len(piece) == size for piece in pieces[:-1])
    assert all(0 < len(piece) <= size for piece in pieces)


def test_an_empty_batch_has_no_microbatches() -> None:
    assert list(microbatches(np.array([], np.int64), encoded_of([3, 4]), 8)) == []


def test_microbatch_size_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        next(microbatches(np.array([0]), encoded_of([3]), 0))
