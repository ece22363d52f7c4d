import hashlib

import numpy as np
import pytest
from mpmath import mp, mpf, workdps
from scipy import stats

from fedloom.core.privacy.gaussian import UNITS
from fedloom.strategies.transforms.noise import derive, normal

KEY = bytes(range(32))


def test_values_are_normal_and_streams_and_keys_are_independent() -> None:
    drawn = [normal(KEY, 0, UNITS, 200_000), normal(KEY, 1, UNITS, 200_000), normal(KEY[::-1], 0, UNITS, 200_000)]
    streams = np.stack(drawn) / UNITS

    for each in streams:
        assert stats.kstest(each, "norm").pvalue > 1e-3
        assert abs(each.std() - 1) < 0.01  # the standard error of 2e5 draws is 0.0016
    rows = np.concatenate([streams[:, :100_000], streams[:, 100_000:]])
    correlation = np.corrcoef(rows) - np.eye(6)
    assert abs(correlation).max() < 5 / np.sqrt(100_000)


def test_bits_are_those_of_shake256_and_karneys_sampler() -> None:
    """Written out in arbitrary precision, so that a stored tree's noise can be subtracted by any later version."""
    count = int(1.42 * 5) + 16  # candidates for five draws
    blocks = [hashlib.shake_256(KEY + bytes([7, 0, 0, 0, n, *[0] * 7])).digest(8 * count) for n in (0, 1)]
    halves = [int.from_bytes(blocks[0][4 * i : 4 * i + 4], "little") for i in range(2 * count)]
    parts = [mpf(int.from_bytes(blocks[1][8 * i : 8 * i + 8], "little")) / 2**64 for i in range(count)]
    expected = []
    with workdps(50):
        weights = [mp.exp(-mpf(k * k) / 2) for k in range(30)]
        for half, test, part in zip(halves[:count], halves[count:], parts, strict=True):
            place = mpf(half >> 1) / 2**31
            k = next(k for k in range(30) if place < sum(weights[: k + 1]) / sum(weights))
            if mpf(test) / 2**32 < mp.exp(-part * (2 * k + part) / 2):
                expected.append((-1 if half & 1 else 1) * int(mp.floor(12345 * (k + part) + mpf(1) / 2)))

    assert normal(KEY, 7, 12345, 5).tolist() == expected[:5]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_any_count_is_served(count: int) -> None:
    assert normal(KEY, 0, 1000, count).shape == (count,)


def test_a_derived_key_depends_on_every_part_and_on_the_secret() -> None:
    parts: list[bytes | memoryview] = [b"round 1", np.arange(5.0).data]
    changed = np.arange(5.0)
    changed[-1] = np.nextafter(4.0, 5.0)

    keys = {
        derive(KEY, parts),
        derive(KEY[::-1], parts),
        derive(KEY, [b"round 2", parts[1]]),
        derive(KEY, [b"round 1", changed.data]),
    }

    assert len(keys) == 4
    assert derive(KEY, parts) == derive(KEY, list(parts))
