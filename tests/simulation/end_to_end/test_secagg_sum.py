"""A secure sum put together from both halves without any transport: exact, whoever is lost on the way."""

from pathlib import Path

import numpy as np
import pytest

from fedloom.client.policy import SecureAggregationPolicy
from fedloom.client.secagg.identity_key import load_identity, public_text
from fedloom.client.secagg.participant import Attempt, Member
from fedloom.core.config.run import SecureAggregationSection
from fedloom.core.errors import ProtocolError
from fedloom.core.secagg.fixed_point import Words, words
from fedloom.core.secagg.keys import Place
from fedloom.core.secagg.steps import ALL
from fedloom.server.secagg.protocol import Unmasking, unmasked

SECTION = SecureAggregationSection(enabled=True, max_clients=16)


def sum_of(
    folder: Path, names: tuple[str, ...], *, shared: tuple[str, ...], survivors: tuple[str, ...], spoil: str = ""
) -> tuple[Words, Words]:
    """What the coordinator gets, and the exact sum of the survivors' words."""
    place, rng = Place("run", 1, 0), np.random.default_rng(0)
    updates = {name: rng.integers(-1000, 1000, 500).astype("<i4").tobytes() for name in names}
    attempts: dict[str, Attempt] = {}
    rules = SecureAggregationPolicy(peers={name: public_text(load_identity(folder / name)) for name in names})
    for name in names:
        member = Member(name, load_identity(folder / name), folder / name, rules, SECTION)
        attempts[name] = Attempt(member, place, updates[name], "ab")
    adverts = {name: attempt.message.parts[ALL] for name, attempt in attempts.items()}
    sealed = {name: attempts[name].share(adverts) for name in names}
    masked = {name: attempts[name].mask({n: sealed[n][name] for n in shared if n != name}) for name in shared}
    signed = {name: attempts[name].confirm(frozenset(survivors)) for name in survivors}
    revealed = {name: attempts[name].unmask(signed) for name in survivors}
    if spoil:
        first = revealed[survivors[0]]
        first[spoil] = first[spoil][:-1] + bytes([first[spoil][-1] ^ 1])
    total = _added(masked, survivors)
    given = Unmasking(place, attempts[names[0]].threshold, adverts, shared, survivors, revealed, total)
    return unmasked(given), _added(updates, survivors)


def _added(payloads: dict[str, bytes], names: tuple[str, ...]) -> Words:
    total = np.zeros(len(payloads[names[0]]) // 4, "<u4")
    for name in names:
        total += words(payloads[name], "<u4")
    return total


@pytest.mark.parametrize("count", [6, 9, 16])
@pytest.mark.parametrize("when", ["nobody", "before masking", "after masking", "both"])
def test_the_sum_is_exact_when_a_third_of_the_clients_are_lost(tmp_path: Path, count: int, when: str) -> None:
    names = tuple(f"client-{number:02d}" for number in range(count))
    lost = names[1::3][: count // 3]
    early = {"before masking": lost, "both": lost[:1]}.get(when, ())
    late = {"after masking": lost, "both": lost[1:]}.get(when, ())
    shared = tuple(name for name in names if name not in early)
    survivors = tuple(name for name in shared if name not in late)

    found, exact = sum_of(tmp_path, names, shared=shared, survivors=survivors)

    np.testing.assert_array_equal(found, exact)


@pytest.mark.parametrize("whose", ["ann", "cat", "fay"])
def test_a_wrong_share_is_found_out_by_name(tmp_path: Path, whose: str) -> None:
    names = ("ann", "ben", "cat", "dan", "eve", "fay")

    with pytest.raises(ProtocolError, match=f"client '{whose}'|do not belong together"):
        sum_of(tmp_path, names, shared=names, survivors=names[:4], spoil=whose)
