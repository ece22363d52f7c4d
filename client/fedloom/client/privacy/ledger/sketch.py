"""What stays of a text when it is written otherwise: its normal form, and a sketch that near-duplicates share.

The sketch is MinHash (Broder, 1997): for each of 32 orders of all shingles it has the first one that the text contains,
so that two texts agree in as many of the 32 as the share of shingles they have in common, on average. Shingles are
words and pairs of neighbouring words. The orders come from a key, without which nobody finds a text by its sketch.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

__all__ = ["SIZE", "Sketches", "alike", "normal", "sketches"]

SIZE = 32
"""Numbers of 16 bits in a sketch: it takes 64 bytes."""

_ALIKE = 16
"""Numbers in which two sketches agree at least when their texts are near-duplicates: half of the shingles."""

_BANDS, _WIDTH = 8, 4
"""Only texts that agree in one of eight groups of four numbers are compared. Those that share 0.7 of their shingles do
so with probability 0.89, those that share 0.1 with 0.0008."""

_MOST_WORDS = 4096
"""Words of a text that are looked at, so that one long document costs no more than it must."""

_MOST_COMPARED = 16
"""Sketches of one band that a text is compared with; what is in more of them is a template and not a text."""

# Scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, kana and Han. Each character counts as a word.
_WORD = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|"
    "[^ \u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)

Sketches = npt.NDArray[np.uint16]


class _Kept(dict[int, int | None]):
    """What `str.translate` makes of each character: letters, marks and digits stay, invisible ones go, others part."""

    def __missing__(self, code: int) -> int | None:
        category = unicodedata.category(chr(code))
        self[code] = code if category[0] in "LMN" else None if category == "Cf" else ord(" ")
        return self[code]


_KEPT = _Kept()


def normal(text: str) -> str:
    r"""The text without what can be changed and not be seen: width, case, spaces, punctuation, invisible characters.

    >>> normal("  Caf\u00e9\u200b, \uff22ed\u00a07!") == normal("cafe\u0301 BED 7") == "caf\u00e9 bed 7"
    True
    >>> normal(" :-) ")
    ':-)'
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.translate(_KEPT).split()) or " ".join(folded.split())


def sketches(texts: Iterable[str], key: bytes) -> Sketches:
    """A sketch of each text in its normal form, shape (n, `SIZE`).

    Args:
        texts: Results of `normal`.
        key: Of at most 64 bytes.
    """
    known: dict[str, int] = {}
    drawn = np.frombuffer(hashlib.shake_256(b"fedloom sketch 1\n" + key).digest(8 * (SIZE + 2)), np.uint64)
    orders, mixing = drawn[:SIZE] | np.uint64(1), drawn[SIZE:] | np.uint64(1)
    found = [_sketch([_hashed(word, key, known) for word in _words(text)], orders, mixing) for text in texts]
    return np.array(found, "<u2").reshape(-1, SIZE)  # of one byte order, whatever machine reads them again


def _words(text: str) -> list[str]:
    return _WORD.findall(text)[:_MOST_WORDS] or [text]


def _hashed(word: str, key: bytes, known: dict[str, int]) -> int:
    if word not in known:
        known[word] = int.from_bytes(hashlib.blake2b(word.encode(), key=key, digest_size=8).digest())
    return known[word]


def _sketch(words: list[int], orders: npt.NDArray[np.uint64], mixing: npt.NDArray[np.uint64]) -> Sketches:
    single = np.array(words, np.uint64)
    pairs = (single[:-1] + single[1:]) * mixing[0]  # a sum, so that a text read backwards has the same
    pairs = (pairs ^ (pairs >> np.uint64(29))) * mixing[1]  # or the order of a pair would follow from that of its words
    shingles = np.concatenate([single, pairs])
    least = (shingles[:, None] * orders).min(0)
    # The high bits of a minimum are nearly zero; those in the middle are as good as random.
    drawn: Sketches = (least >> np.uint64(16)).astype(np.uint16)
    return drawn


def alike(ours: Sketches, theirs: Sketches) -> npt.NDArray[np.bool_]:
    """Which of `ours` are near-duplicates of one of `theirs`; shape (len(ours),)."""
    found = np.zeros(len(ours), np.bool_)
    for band in range(_BANDS):
        part = slice(_WIDTH * band, _WIDTH * (band + 1))
        mine, known = (np.ascontiguousarray(each[:, part]).view(np.uint64).ravel() for each in (ours, theirs))
        order = np.argsort(known, kind="stable")
        begins, ends = (np.searchsorted(known[order], mine, side=side) for side in ("left", "right"))
        for step in range(_MOST_COMPARED):
            asked = np.flatnonzero(~found & (begins + step < ends))
            if not len(asked):
                break
            equal = ours[asked] == theirs[order[begins[asked] + step]]
            found[asked] = equal.sum(1) >= _ALIKE
    return found
