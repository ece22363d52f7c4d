"""The cryptography of a secure sum against independent references: brute force, big integers, and another AES."""

import itertools
import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sympy import isprime  # type: ignore[import-untyped]  # comes with torch

from fedloom.core.errors import CodecError, ConfigError, PolicyError, ProtocolError, SchemaError
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.core.secagg import keys
from fedloom.core.secagg.fixed_point import FixedPoint, Words, words
from fedloom.core.secagg.keys import ADVERT_BYTES, SEALED_BYTES, Advert, Place
from fedloom.core.secagg.masks import add_masks
from fedloom.core.secagg.shamir import (
    PRIME,
    SHARE_BYTES,
    combine,
    secret_bytes,
    share_from_bytes,
    share_to_bytes,
    split,
)
from fedloom.core.secagg.steps import needed

SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (2, 3)), TensorSpec("m.B", "m", Role.LORA_B, (4, 2))), 2.0)
PLACE = Place("run", 1, 7)
SMALL = 7


def draws(*values: int):  # type: ignore[no-untyped-def]  # a stand-in for `secrets.randbelow`
    left = list(values)
    return lambda bound: left.pop(0) % bound


# Shamir


def test_the_field_is_prime_and_holds_every_secret_of_32_bytes() -> None:
    assert isprime(PRIME)
    assert PRIME > 2**256 - 1
    assert PRIME < 2 ** (8 * SHARE_BYTES)


@pytest.mark.parametrize(("threshold", "count"), [(1, 1), (2, 3), (3, 4), (4, 4)])
def test_shares_are_the_values_of_the_polynomial(threshold: int, count: int) -> None:
    """Every polynomial over a small field, against its value by powers."""
    for coefficients in itertools.product(range(SMALL), repeat=threshold):
        shares = split(coefficients[0], threshold, count, prime=SMALL, draw=draws(*coefficients[1:]))

        assert shares == [sum(c * x**i for i, c in enumerate(coefficients)) % SMALL for x in range(1, count + 1)]


@pytest.mark.parametrize(("threshold", "count"), [(2, 4), (3, 5)])
def test_any_t_shares_give_the_secret(threshold: int, count: int) -> None:
    secret = 2**256 - 1
    shares = dict(enumerate(split(secret, threshold, count), start=1))

    for size in range(threshold, count + 1):
        for chosen in itertools.combinations(shares, size):
            assert combine({x: shares[x] for x in chosen}) == secret


def test_fewer_than_t_shares_say_nothing_about_the_secret() -> None:
    """Over a small field, whatever t - 1 shares somebody holds, every secret is equally likely: counted, not argued."""
    threshold, count = 3, 4
    for held in itertools.combinations(range(count), threshold - 1):
        seen: dict[tuple[int, ...], Counter[int]] = {}
        for secret, *rest in itertools.product(range(SMALL), repeat=threshold):
            shares = split(secret, threshold, count, prime=SMALL, draw=draws(*rest))
            seen.setdefault(tuple(shares[i] for i in held), Counter())[secret] += 1

        assert len(seen) == SMALL ** (threshold - 1)
        assert all(counts == dict.fromkeys(range(SMALL), 1) for counts in seen.values())


def test_two_splits_of_one_secret_share_nothing() -> None:
    assert not set(split(5, 3, 5)) & set(split(5, 3, 5))


@given(st.integers(0, PRIME - 1))
def test_a_share_survives_its_bytes(share: int) -> None:
    assert share_from_bytes(share_to_bytes(share)) == share
    assert len(share_to_bytes(share)) == SHARE_BYTES


@pytest.mark.parametrize("data", [b"", bytes(32), bytes(34), b"\xff" * 33, PRIME.to_bytes(33, "big")])
def test_bytes_that_are_no_share_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="share"):
        share_from_bytes(data)


@pytest.mark.parametrize(
    ("secret", "threshold", "count"), [(-1, 1, 1), (SMALL, 1, 1), (0, 0, 2), (0, 3, 2), (0, 2, SMALL)]
)
def test_a_split_out_of_range_is_refused(secret: int, threshold: int, count: int) -> None:
    with pytest.raises(ProtocolError, match="out of range"):
        split(secret, threshold, count, prime=SMALL)


@pytest.mark.parametrize("shares", [{}, {0: 1}, {SMALL: 1}, {1: SMALL}, {1: -1}])
def test_shares_outside_the_field_are_refused(shares: dict[int, int]) -> None:
    with pytest.raises(ProtocolError, match="cannot be combined"):
        combine(shares, prime=SMALL)


def test_a_wrong_share_is_seen_when_the_secret_does_not_fit() -> None:
    with pytest.raises(ProtocolError, match="do not belong together"):
        secret_bytes(2**256)


# Integers


@given(st.lists(st.floats(-4, 4, width=32), min_size=14, max_size=14))
def test_every_value_is_rounded_to_the_nearest_step(values: list[float]) -> None:
    numbers = FixedPoint(4.0, 256)
    tensors = {
        "m.A": np.array(values[:6], np.float32).reshape(2, 3),
        "m.B": np.array(values[6:], np.float32).reshape(4, 2),
    }

    payload = numbers.encode(SCHEMA, tensors)

    assert len(payload) == 4 * numbers.size(SCHEMA) == 4 * 14
    for value, word in zip(values, words(payload, "<u4").view(np.int32), strict=True):
        error = abs(Fraction(int(word)) * Fraction(numbers.step) - Fraction(value))
        assert error <= Fraction(numbers.step) * Fraction(1_000_001, 2_000_000)


@pytest.mark.parametrize("clients", [3, 16, 256, 1000])
def test_a_sum_of_extremes_cannot_wrap(clients: int) -> None:
    numbers = FixedPoint(1.0, clients)

    assert clients * numbers.levels < 2**31
    for sign in (1, -1):
        extreme = {each.name: np.full(each.shape, sign, np.float32) for each in SCHEMA.tensors}
        total = np.zeros(SCHEMA.size, "<u4")
        for _ in range(clients):
            total += words(numbers.encode(SCHEMA, extreme), "<u4")
        for tensor in numbers.mean(SCHEMA, total, b"", [b""] * clients).values():
            np.testing.assert_allclose(tensor, sign, rtol=1e-7)


def test_the_mean_of_a_sum_is_that_of_exact_integers() -> None:
    numbers, rng = FixedPoint(2.0, 5), np.random.default_rng(0)
    updates = [
        {each.name: rng.uniform(-2, 2, each.shape).astype(np.float32) for each in SCHEMA.tensors} for _ in range(5)
    ]
    total = np.zeros(SCHEMA.size, "<u4")
    exact = [0] * SCHEMA.size
    for update in updates:
        payload = numbers.encode(SCHEMA, update)
        total += words(payload, "<u4")
        exact = [a + int(b) for a, b in zip(exact, words(payload, "<u4").view(np.int32), strict=True)]

    mean = numbers.mean(SCHEMA, total, b"", [b""] * 5)

    flat = np.concatenate([mean[each.name].ravel() for each in SCHEMA.tensors])
    np.testing.assert_array_equal(flat, (np.array(exact) * (numbers.step / 5)).astype(np.float32))
    for name, tensor in mean.items():
        plain = np.mean([update[name].astype(np.float64) for update in updates], axis=0)
        assert np.abs(tensor - plain).max() <= numbers.step / 2 + np.spacing(np.float32(2.0)) / 2


@pytest.mark.parametrize("value", [4.001, -4.001, np.nan, np.inf, -np.inf])
def test_a_value_beyond_the_range_is_refused_by_name(value: float) -> None:
    tensors = SCHEMA.zeros()
    tensors["m.B"][2, 1] = value

    with pytest.raises(CodecError, match=r"'m.B' changed by .*max_change = 4"):
        FixedPoint(4.0, 256).encode(SCHEMA, tensors)


def test_a_sum_of_more_clients_than_the_step_was_chosen_for_is_refused() -> None:
    numbers = FixedPoint(4.0, 256)

    for clients in (0, 257):
        with pytest.raises(ConfigError, match="1 to 256"):
            numbers.mean(SCHEMA, np.zeros(SCHEMA.size, "<u4"), b"", [b""] * clients)


@pytest.mark.parametrize("arguments", [(0.0, 3), (-1.0, 3), (float("inf"), 3), (1e-310, 3), (1.0, 0), (1.0, 2**31)])
def test_settings_that_could_overflow_are_refused(arguments: tuple[float, int]) -> None:
    with pytest.raises(ConfigError, match="max_c"):
        FixedPoint(*arguments)


def test_what_is_not_the_schema_is_refused() -> None:
    with pytest.raises(SchemaError):
        FixedPoint(4.0, 3).encode(SCHEMA, {"m.A": np.zeros((2, 3), np.float32)})
    with pytest.raises(CodecError, match="shape"):
        FixedPoint(4.0, 3).mean(SCHEMA, np.zeros(3, "<u4"), b"", [b""] * 3)
    with pytest.raises(CodecError, match="no whole number"):
        words(bytes(5), "<u4")


# Masks


def keystream(key: bytes, count: int) -> Words:
    """AES-256 of 0, 1, 2 ..., block by block in ECB mode: counter mode spelt out."""
    blocks = -(-4 * count // 16)
    counters = b"".join(number.to_bytes(16, "big") for number in range(blocks))
    stream = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(counters)
    return np.frombuffer(stream[: 4 * count], "<u4")


@pytest.mark.parametrize("count", [1, 5, 1 << 15, (1 << 15) + 1, 70_001])
def test_masks_are_added_and_subtracted_word_by_word(count: int) -> None:
    """Across the ends of the stretches that the sum is worked on in."""
    one, two, three = (bytes([number]) * 32 for number in (1, 2, 3))
    total = np.arange(count, dtype="<u4")

    add_masks(total, [one, two], [three])

    exact = np.arange(count, dtype=np.int64)
    for key, sign in ((one, 1), (two, 1), (three, -1)):
        exact += sign * keystream(key, count).astype(np.int64)
    np.testing.assert_array_equal(total, exact % 2**32)


def test_masks_cancel_exactly() -> None:
    names = ["a", "b", "c", "d"]
    totals = {name: np.zeros(1000, "<u4") for name in names}
    for one, two in itertools.combinations(names, 2):
        key = (one + two).encode() * 16
        add_masks(totals[one], [key], [])
        add_masks(totals[two], [], [key])

    assert all(total.any() for total in totals.values())
    assert not np.sum(list(totals.values()), axis=0, dtype=np.uint32).any()


@pytest.mark.parametrize("value", [0, 2**32 - 1])
def test_a_masked_update_looks_uniform_whatever_it_is(value: int) -> None:
    total = np.full(200_000, value, "<u4")

    add_masks(total, [bytes(range(32))], [])

    counts = np.bincount(total.view(np.uint8), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-6
    pairs = np.bincount(total.view("<u2"), minlength=1 << 16)
    assert stats.chisquare(pairs).pvalue > 1e-6


# Keys


def pair() -> tuple[X25519PrivateKey, bytes]:
    key = X25519PrivateKey.generate()
    return key, key.public_key().public_bytes_raw()


def test_both_sides_of_a_pair_derive_one_key_and_nobody_else_does() -> None:
    (ann, ann_public), (ben, ben_public), (eve, _) = pair(), pair(), pair()

    key = keys.pair_key(ann, ben_public, PLACE, "ann", "ben")

    assert key == keys.pair_key(ben, ann_public, PLACE, "ben", "ann")
    others = [
        keys.pair_key(eve, ben_public, PLACE, "ann", "ben"),
        keys.pair_key(ann, ben_public, Place("run", 1, 8), "ann", "ben"),
        keys.pair_key(ann, ben_public, Place("run", 2, 7), "ann", "ben"),
        keys.pair_key(ann, ben_public, Place("other", 1, 7), "ann", "ben"),
        keys.pair_key(ann, ben_public, PLACE, "ann", "cat"),
    ]
    assert len({key, *others}) == 6


def test_a_public_key_that_gives_no_secret_is_refused() -> None:
    with pytest.raises(ProtocolError, match="public key 0000"):
        keys.pair_key(pair()[0], bytes(32), PLACE, "ann", "ben")


def test_sealed_shares_open_for_the_receiver_alone() -> None:
    (ann, ann_public), (ben, ben_public), (eve, _) = pair(), pair(), pair()
    shares = bytes(range(2 * SHARE_BYTES))

    sealed = keys.seal_shares(ann, ben_public, PLACE, "ann", "ben", shares)

    assert len(sealed) == SEALED_BYTES
    assert shares not in sealed
    assert keys.open_shares(ben, ann_public, PLACE, "ann", "ben", sealed) == shares
    for key, place, sender, receiver, message in (
        (eve, PLACE, "ann", "ben", sealed),
        (ben, Place("run", 1, 8), "ann", "ben", sealed),
        (ben, PLACE, "eve", "ben", sealed),
        (ben, PLACE, "ben", "ann", sealed),
        (ben, PLACE, "ann", "ben", sealed[:-1] + bytes([sealed[-1] ^ 1])),
    ):
        with pytest.raises(ProtocolError, match=f"peer '{sender}'"):
            keys.open_shares(key, ann_public, place, sender, receiver, message)


def advert(place: Place = PLACE, client: str = "ann") -> tuple[Advert, bytes]:
    identity = Ed25519PrivateKey.generate()
    made = keys.advertise(identity, place, client, X25519PrivateKey.generate(), X25519PrivateKey.generate(), bytes(32))
    return made, identity.public_key().public_bytes_raw()


def test_keys_signed_by_the_pinned_identity_for_this_place_are_taken() -> None:
    made, pinned = advert()

    keys.check_advert(Advert.from_bytes("ann", made.to_bytes()), PLACE, "ann", pinned)

    assert len(made.to_bytes()) == ADVERT_BYTES


@pytest.mark.parametrize("changed", range(0, ADVERT_BYTES, 16))
def test_keys_changed_on_the_way_are_refused_by_name(changed: int) -> None:
    made, pinned = advert()
    data = bytearray(made.to_bytes())
    data[changed] ^= 1

    with pytest.raises(PolicyError, match="peer 'ann'"):
        keys.check_advert(Advert.from_bytes("ann", bytes(data)), PLACE, "ann", pinned)


@pytest.mark.parametrize("place", [Place("run", 1, 6), Place("run", 2, 7), Place("other", 1, 7)])
def test_keys_replayed_from_elsewhere_are_refused_by_name(place: Place) -> None:
    made, pinned = advert(place)

    with pytest.raises(PolicyError, match="peer 'ann' in round 8"):
        keys.check_advert(made, PLACE, "ann", pinned)


def test_keys_of_another_client_or_identity_are_refused_by_name() -> None:
    made, pinned = advert(client="ben")

    with pytest.raises(PolicyError, match="peer 'ann'"):
        keys.check_advert(made, PLACE, "ann", pinned)
    with pytest.raises(PolicyError, match="peer 'ben'"):
        keys.check_advert(made, PLACE, "ben", advert()[1])


def test_a_signature_confirms_one_list_in_one_cohort_and_place() -> None:
    identity = Ed25519PrivateKey.generate()
    pinned = identity.public_key().public_bytes_raw()
    cohort = keys.cohort_digest(PLACE, {name: advert(client=name)[0] for name in ("ann", "ben")})
    signature = keys.sign_survivors(identity, PLACE, cohort, {"ben", "ann"})

    assert keys.confirms(signature, pinned, PLACE, cohort, ["ann", "ben"])
    assert not keys.confirms(signature, pinned, PLACE, cohort, ["ann"])
    assert not keys.confirms(signature, pinned, PLACE, "other", ["ann", "ben"])
    assert not keys.confirms(signature, pinned, Place("run", 1, 8), cohort, ["ann", "ben"])
    assert not keys.confirms(signature, advert()[1], PLACE, cohort, ["ann", "ben"])
    assert not keys.confirms(b"", pinned, PLACE, cohort, ["ann", "ben"])


def test_a_cohort_shown_other_keys_has_another_digest() -> None:
    ann, ben = advert(client="ann")[0], advert(client="ben")[0]

    digests = {
        keys.cohort_digest(PLACE, cohort)
        for cohort in ({"ann": ann, "ben": ben}, {"ann": ben, "ben": ann}, {"ann": ann}, {"ann": ann, "ben": ann})
    }

    assert len(digests) == 4
    assert json.loads(PLACE.statement("cohort"))[1] == "cohort"


@given(st.integers(1, 1000), st.floats(0.5, 1))
def test_the_threshold_is_more_than_half_and_at_most_all(clients: int, threshold: float) -> None:
    found = needed(clients, threshold)

    assert clients / 2 < found <= max(clients, 1)
    assert found >= threshold * clients


@pytest.mark.parametrize("clients", range(3, 100, 3))
def test_two_thirds_of_a_cohort_are_just_that(clients: int) -> None:
    """No rounding of 2/3 asks for one more."""
    assert needed(clients, 2 / 3) == 2 * clients // 3
