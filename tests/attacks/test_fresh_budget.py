"""Somebody who wants a fresh budget for rows that have spent theirs, and gives them a little changed.

A new state folder is a new account. What stands in the way are the records of examples that all accounts of a machine
share; the first release knew a text only to the letter.
"""

import hashlib
import random
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.data.load import load_rows
from fedloom.client.data.rows import Rows
from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger.account import open_account
from fedloom.client.privacy.ledger.anchor import default_anchors
from fedloom.client.privacy.ledger.sketch import alike, normal, sketches
from fedloom.core.errors import LedgerError

KEY = b"k" * 32


def rows(texts: list[str]) -> Rows:
    return Rows(tuple(texts), np.zeros(len(texts), np.int64), ("",) * len(texts), ("a", "b"))


def elsewhere(policy: Policy, folder: Path) -> Policy:
    return policy.model_copy(update={"client": policy.client.model_copy(update={"state": folder})})


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """Six hundred sentences of one kind, no two alike."""
    found = load_rows("sentiment", ("negative", "positive"), "train")
    movies = [text for text, group in zip(found.texts, found.groups, strict=True) if group == "movie"]
    return list(dict.fromkeys(movies))[:600]


@pytest.fixture
def spent(policy: Policy, sentences: list[str]) -> Policy:
    """A site whose account the first half is charged to."""
    open_account(policy, rows(sentences[:300])).close()
    return policy


def _replaced(text: str) -> str:
    words = text.split()
    place = random.Random(text).randrange(len(words))
    return " ".join([*words[:place], "something", *words[place + 1 :]])


INVISIBLE: dict[str, Callable[[str], str]] = {
    "a space behind": lambda text: text + " ",
    "spaces between": lambda text: text.replace(" ", "  "),
    "no-break spaces": lambda text: text.replace(" ", "\u00a0"),
    "a line break": lambda text: text.replace(" ", "\r\n", 1),
    "capitals": str.upper,
    "wide letters": lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
    "taken apart": lambda text: unicodedata.normalize("NFD", text),
    "no width": lambda text: "\u200b".join(text),
    "a soft hyphen": lambda text: text[:3] + "\u00ad" + text[3:],
    "a full stop": lambda text: text + ".",
    "no punctuation": lambda text: "".join(c if c.isalnum() or c == " " else " " for c in text),
}
"""Nobody sees these, or they say nothing."""

SMALL: dict[str, Callable[[str], str]] = {
    "a word behind": lambda text: text + " note",
    "a heading": lambda text: "Patient record: " + text,
    "a word replaced": _replaced,
    "a word left out": lambda text: " ".join(text.split()[:-1]) or text,
    "read backwards": lambda text: " ".join(text.split()[::-1]),
    "two sentences in one": lambda text: text + " " + text,
}


@pytest.mark.parametrize("edit", INVISIBLE)
def test_a_change_that_nobody_sees_is_no_fresh_budget(
    spent: Policy, sentences: list[str], edit: str, tmp_path: Path
) -> None:
    edited = [INVISIBLE[edit](text) for text in sentences[:300]]

    with pytest.raises(LedgerError, match="300 of 300 texts are charged to another account"):
        open_account(elsewhere(spent, tmp_path / "fresh"), rows(edited))


@pytest.mark.parametrize("edit", SMALL)
def test_near_duplicates_are_no_fresh_budget(spent: Policy, sentences: list[str], edit: str, tmp_path: Path) -> None:
    edited = [SMALL[edit](text) for text in sentences[:300]]

    with pytest.raises(LedgerError, match=r"\d+ of 300 texts are (nearly|charged)"):
        open_account(elsewhere(spent, tmp_path / "fresh"), rows(edited))


def test_near_duplicates_among_many_other_rows_are_found(spent: Policy, tmp_path: Path) -> None:
    found = load_rows("sentiment", ("negative", "positive"), "train")
    others = [text for text, group in zip(found.texts, found.groups, strict=True) if group == "nyt"]
    known = [text for text, group in zip(found.texts, found.groups, strict=True) if group == "movie"]
    edited = [_replaced(text) for text in dict.fromkeys(known)][:300]

    with pytest.raises(LedgerError, match=rf"\d+ of {len(others) + 300} texts are nearly those"):
        open_account(elsewhere(spent, tmp_path / "fresh"), rows([*others, *edited]))


def test_other_texts_of_the_same_kind_are_an_account_of_their_own(
    spent: Policy, sentences: list[str], tmp_path: Path
) -> None:
    with open_account(elsewhere(spent, tmp_path / "fresh"), rows(sentences[300:])) as other:
        assert other.charges() == []


def test_pictures_are_told_apart_by_their_fingerprints_alone(policy: Policy, tmp_path: Path) -> None:
    def pictures(kind: str) -> Rows:
        names = tuple(f"picture 28x28 {hashlib.sha256(f'{kind}{each}'.encode()).hexdigest()}" for each in range(50))
        none = np.zeros(50, np.int64)
        return Rows(names, none, ("",) * 50, ("a", "b"), "image-classification", images=(b"x",) * 50)

    open_account(policy, pictures("one")).close()
    open_account(elsewhere(policy, tmp_path / "fresh"), pictures("another")).close()

    with pytest.raises(LedgerError, match="50 of 50 texts are charged"):
        open_account(elsewhere(policy, tmp_path / "third"), pictures("one"))


def as_in_the_first_release(texts: list[str]) -> None:
    """Leave of the account's records what the first release wrote: digests of the texts to the letter."""
    (path,) = default_anchors().glob("*.examples")
    key = (default_anchors() / "examples.key").read_bytes()
    path.write_bytes(b"".join(sorted(hashlib.blake2b(t.encode(), key=key, digest_size=16).digest() for t in texts)))
    path.with_suffix(".sketches").unlink()


def test_an_account_of_the_first_release_is_known_by_its_exact_digests(
    spent: Policy, sentences: list[str], tmp_path: Path
) -> None:
    as_in_the_first_release(sentences[:300])

    with pytest.raises(LedgerError, match="1 of 2 texts are charged to another account"):
        open_account(elsewhere(spent, tmp_path / "fresh"), rows([sentences[0], sentences[400]]))


def test_and_in_every_other_way_once_its_site_has_used_it_again(
    spent: Policy, sentences: list[str], tmp_path: Path
) -> None:
    as_in_the_first_release(sentences[:300])
    open_account(spent, rows(sentences[:300])).close()

    for edit in (INVISIBLE["a space behind"], SMALL["a word replaced"]):
        with pytest.raises(LedgerError, match="another account"):
            open_account(elsewhere(spent, tmp_path / "fresh"), rows([edit(text) for text in sentences[:300]]))


def test_a_sketch_estimates_the_share_of_common_shingles(sentences: list[str]) -> None:
    """Against sets of words and of pairs, compared in full."""

    def shingles(text: str) -> set[object]:
        words = text.split()
        return {*words, *map(frozenset, pairwise(words))}

    plain = [normal(text) for text in sentences]
    for share in (0.9, 0.6, 0.3):
        cut = [" ".join(text.split()[: max(1, round(share * len(text.split())))]) + " note" for text in plain]
        exact = [
            len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b)) for a, b in zip(plain, cut, strict=True)
        ]

        found = (sketches(plain, KEY) == sketches(cut, KEY)).mean(1)

        assert found.mean() == pytest.approx(np.mean(exact), abs=0.02)
        assert np.sqrt(np.mean((found - exact) ** 2)) < 0.1, "32 numbers: at most 0.09 of binomial spread"


def test_sketches_tell_nothing_without_their_key(sentences: list[str]) -> None:
    plain = [normal(text) for text in sentences[:300]]

    assert alike(sketches(plain, KEY), sketches(plain, KEY)).all()
    assert not alike(sketches(plain, KEY), sketches(plain, b"l" * 32)).any()
