"""The key stream is ChaCha20's: as published, and as another implementation makes it."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.client.privacy.dp_sgd.chacha import blocks, words
from tests.support.ciphers import PUBLISHED, known_stream

CPU = torch.device("cpu")


@pytest.mark.parametrize("section", PUBLISHED)
def test_the_stream_is_the_published_one(section: str) -> None:
    key, counter, nonce, digits = PUBLISHED[section]
    expected, sent = bytes.fromhex(digits), bytes.fromhex(nonce)
    first = counter | int.from_bytes(sent[:4], "little") << 32

    found = blocks(key, first, -(-len(expected) // 64), CPU, sent[4:])

    assert found.numpy().tobytes()[: len(expected)] == expected


@pytest.mark.parametrize("first", [0, 1, 1000, (1 << 32) - 2, (1 << 40) + 3])
def test_the_stream_is_another_implementations(first: int) -> None:
    """Also where the counter needs its high half."""
    for count in (1, 5, 333):
        key = os.urandom(32)

        assert blocks(key, first, count, CPU).numpy().tobytes() == known_stream(key, first, count)


@settings(max_examples=25)
@given(st.integers(0, 200), st.integers(1, 200))
def test_words_are_the_stream_from_any_place(first: int, count: int) -> None:
    key = bytes(range(1, 33))

    found = words(key, first, count, CPU)

    assert found.shape == (count,)
    assert found.numpy().tobytes() == known_stream(key, 0, 64)[8 * first : 8 * (first + count)]
