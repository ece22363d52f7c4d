import hashlib

import numpy as np
import pytest
from scipy import stats

from fedloom.strategies.noise import derive, normal

KEY = bytes(range(32))


def test_values_are_standard_normal_and_streams_and_keys_are_independent() -> None:
    streams = np.stack([normal(KEY, 0, 200_000), normal(KEY, 1, 200_000), normal(KEY[::-1], 0, 200_000)])

    for each in streams:
        assert stats.kstest(each, "norm").pvalue > 1e-3
        assert abs(each.std() - 1) < 0.01  # the standard error of 2e5 draws is 0.0016
    # Halves of one stream come from the same pairs of uniforms; they must not be correlated either.
    rows = np.concatenate([streams[:, :100_000], streams[:, 100_000:]])
    correlation = np.corrcoef(rows) - np.eye(6)
    assert abs(correlation).max() < 5 / np.sqrt(100_000)


def test_bits_are_those_of_shake256_and_box_muller() -> None:
    """Written out with integers, so that a stored tree's noise can be subtracted by any later version."""
    content = hashlib.shake_256(KEY + bytes([7, 0, 0, 0])).digest(32)
    words = [int.from_bytes(content[start : start + 8], "little") >> 11 for start in range(0, 32, 8)]
    radius = [np.sqrt(-2 * np.log(1 - word / 2**53)) for word in words[:2]]
    angle = [2 * np.pi * word / 2**53 for word in words[2:]]
    expected = [radius[0] * np.cos(angle[0]), radius[1] * np.cos(angle[1]), radius[0] * np.sin(angle[0])]

    np.testing.assert_allclose(normal(KEY, 7, 3), expected, rtol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_any_count_is_served(count: int) -> None:
    assert normal(KEY, 0, count).shape == (count,)


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
