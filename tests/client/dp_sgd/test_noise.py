"""Noise that a device draws for itself: the CPU's whole numbers, from the same words, with one wait."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from fedloom.client.privacy.auditing.attacks import LIMIT, dependence, rehearse
from fedloom.client.privacy.dp_sgd import noise as module
from fedloom.client.privacy.dp_sgd.chacha import words
from fedloom.client.privacy.dp_sgd.noise import check_device, noise, rounded_normal
from fedloom.client.privacy.dp_sgd.rng import Seeded, System
from fedloom.core.errors import ConfigError, ModelError
from fedloom.core.privacy import gaussian
from fedloom.core.privacy.gaussian import LARGEST_DEVIATION, UNITS, Words
from tests.support.waits import Waits

CPU = torch.device("cpu")
Table = npt.NDArray[np.uint64]


def table(seed: int, count: int = 1 << 16) -> Table:
    return np.random.Generator(np.random.Philox(seed)).integers(0, 1 << 64, count, np.uint64)


def on_tensors(given: Table, deviation: int, count: int) -> npt.NDArray[np.int64]:
    """What torch draws from the words of a table."""
    signed = torch.from_numpy(given.view(np.int64))
    found: npt.NDArray[np.int64] = rounded_normal(
        lambda first, many: signed[first : first + many], deviation, count, CPU
    ).numpy()
    return found


def reordered(given: Table) -> Words:
    """The words of a table as the CPU's sampler asks for them: the halves of all candidates, then all fractions.

    Further words it asks for one by one.
    """
    position, fractions = 0, None

    def take(count: int) -> Table:
        nonlocal position, fractions
        if fractions is not None:
            found, fractions = fractions, None
            return found
        if count == 1:
            position += 1
            return given[position - 1 : position]
        pairs = given[position : position + 2 * count].reshape(-1, 2)
        position += 2 * count
        fractions = pairs[:, 1].copy()
        low, high = (pairs[:, 0] & np.uint64(0xFFFFFFFF)), pairs[:, 0] >> np.uint64(32)
        return np.concatenate([low, high]).astype(np.uint32).view(np.uint64)

    return take


@pytest.fixture(autouse=True)
def _one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU draws all candidates of a pass at once, as a device does."""
    monkeypatch.setattr(gaussian, "_BATCH", 1 << 40)


@pytest.fixture
def draws_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU draws by tensors, as CUDA does."""
    monkeypatch.setattr(module, "_DRAW", frozenset({"cpu"}))
    check_device.cache_clear()


@pytest.mark.parametrize("deviation", [1, 1000, UNITS, LARGEST_DEVIATION])
@pytest.mark.parametrize("count", [1, 17, 5000])
def test_tensors_give_the_integers_of_the_cpus_sampler(deviation: int, count: int) -> None:
    for seed in range(10):
        given = table(seed)

        expected = gaussian.rounded_normal(reordered(given), deviation, count)

        np.testing.assert_array_equal(on_tensors(given, deviation, count), expected)


def test_a_second_pass_goes_on_where_the_first_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    given = table(3)
    monkeypatch.setattr(gaussian, "candidates", lambda missing: missing // 2 + 17)
    with Waits() as waits:
        found = on_tensors(given, UNITS, 1000)

    np.testing.assert_array_equal(found, gaussian.rounded_normal(reordered(given), UNITS, 1000))
    assert len(waits.found) > 1, "one for each pass"


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_how_many_are_computed_at_a_time_changes_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = table(4)
    expected = on_tensors(given, UNITS, 300)
    monkeypatch.setattr(module, "_CHUNK", chunk)

    np.testing.assert_array_equal(on_tensors(given, UNITS, 300), expected)


@pytest.mark.parametrize("chunk", [1 << 20, 1 << 8])
def test_a_draw_waits_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    with Waits() as waits:
        rounded_normal(partial(words, bytes(32), device=CPU), UNITS, 10_000, CPU)

    assert len(waits.found) == 1


@pytest.mark.parametrize("margin", [2.0, 2.0**-3])
@pytest.mark.parametrize("chunk", [1 << 20, 16])
def test_what_is_open_is_decided_exactly_from_the_same_further_words(
    margin: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All candidates, and some of them; their number is that of the CPU, and so are their words."""
    given, decided = table(5), gaussian.decided
    asked: list[int] = []

    def noting(more: Words, *rest: int) -> int | None:
        asked.append(rest[1])
        return decided(more, *rest)

    monkeypatch.setattr(gaussian, "UNSURE", margin)
    monkeypatch.setattr(gaussian, "decided", noting)
    monkeypatch.setattr(module, "_CHUNK", chunk)

    found = on_tensors(given, 12345, 150)
    mine, asked[:] = list(asked), []
    expected = gaussian.rounded_normal(reordered(given), 12345, 150)

    assert mine == asked
    assert len(mine) == gaussian.candidates(150) if margin == 2.0 else 10 < len(mine) < 150
    np.testing.assert_array_equal(found, expected)


def test_further_words_come_from_the_key_stream_too(monkeypatch: pytest.MonkeyPatch) -> None:
    key = bytes(range(32))
    given = words(key, 0, 4096, CPU).numpy().view(np.uint64)
    monkeypatch.setattr(gaussian, "UNSURE", 2.0**-3)

    found = rounded_normal(partial(words, key, device=CPU), UNITS, 100, CPU)

    np.testing.assert_array_equal(found.numpy(), gaussian.rounded_normal(reordered(given), UNITS, 100))


HALF = 1 << 63
EDGE = math.floor(math.exp(-1 / 8) * 2**32)
"""First 32 bits of the probability with which 0 + 1/2 is accepted."""
CARRY = -(-(1 << 63) // 1000) - 1
"""The largest fraction with 1000 times it below a half."""
AT_AN_EDGE = {
    "of being accepted": (EDGE << 32, HALF),
    "of being accepted, with a sign": (EDGE << 32 | 1, HALF),
    "of a rounding step": (0, CARRY),
    "of a rounding step, with a sign": (1, CARRY),
    **{f"of whole part {each}": (edge << 1, 0) for each, edge in enumerate(gaussian.edges()[:-1])},
}


@pytest.mark.parametrize("where", AT_AN_EDGE)
def test_a_candidate_at_an_edge_is_decided_by_further_words(where: str) -> None:
    """The tenth of a pass; two streams that differ in what follows the pass alone."""
    outcomes = []
    for fill in (0, (1 << 64) - 1):
        given = table(6)
        given[20:22] = AT_AN_EDGE[where]
        given[2 * gaussian.candidates(20) :] = fill

        found = on_tensors(given, 1000, 20)

        np.testing.assert_array_equal(found, gaussian.rounded_normal(reordered(given), 1000, 20))
        outcomes.append(found.tolist())
    assert outcomes[0] != outcomes[1]


def test_a_second_pass_begins_behind_the_further_words() -> None:
    given = table(7)
    given[0:2] = AT_AN_EDGE["of being accepted"]
    given[2 : 2 * gaussian.candidates(20) : 2] |= np.uint64(0xFFFFFFFF << 32)  # all but the first are rejected

    found = on_tensors(given, 1000, 20)

    np.testing.assert_array_equal(found, gaussian.rounded_normal(reordered(given), 1000, 20))


@pytest.mark.parametrize("wrong", [0, LARGEST_DEVIATION + 1])
def test_a_deviation_out_of_range_is_refused(wrong: int) -> None:
    with pytest.raises(ConfigError, match="is allowed"):
        on_tensors(table(1), wrong, 1)


@pytest.mark.usefixtures("draws_here")
def test_what_a_device_draws_is_normal_independent_and_never_the_same() -> None:
    draws = np.concatenate([noise(System(), LARGEST_DEVIATION, 1 << 15, CPU).numpy() for _ in range(4)])

    assert stats.kstest(draws / LARGEST_DEVIATION, "norm").pvalue > 1e-6
    assert dependence(draws / LARGEST_DEVIATION) < LIMIT
    assert len(np.unique(np.abs(draws))) > len(draws) - 20
    assert len({noise(System(), LARGEST_DEVIATION, 4, CPU).numpy().tobytes() for _ in range(500)}) == 500


@pytest.mark.usefixtures("draws_here")
def test_attacks_on_a_step_whose_noise_a_device_draws_fail() -> None:
    rehearse(0.93, 1.0, device=CPU)


@pytest.mark.usefixtures("draws_here")
def test_a_device_draws_under_a_whole_key_of_the_systems_that_no_seed_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[bytes] = []

    def noting(key: bytes, first: int, count: int, device: torch.device) -> torch.Tensor:
        keys.append(key)
        return words(key, first, count, device)

    check_device(CPU)
    monkeypatch.setattr(module, "words", noting)
    drawn = []
    for _ in range(3):
        torch.manual_seed(0)
        np.random.seed(0)
        drawn.append(noise(System(), UNITS, 8, CPU).tolist())

    assert len({tuple(each) for each in drawn}) == 3
    assert len(set(keys)) == 3
    assert all(len(set(key)) > 16 for key in keys), "32 random bytes have 30 different ones"


@pytest.mark.usefixtures("draws_here")
def test_a_seeded_stream_is_the_cpus_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian, "_BATCH", 1 << 14)

    found = noise(Seeded(1, 2), UNITS, 100_000, CPU)

    np.testing.assert_array_equal(found.numpy(), Seeded(1, 2).normal(UNITS, 100_000))


def wrong_stream(key: bytes, first: int, count: int, device: torch.device) -> torch.Tensor:
    return words(key, first, count, device) + 1


def wrong_sampler() -> Callable[..., tuple[torch.Tensor, ...]]:
    """Wrong on the device, which is asked first."""
    fast, calls = module._fast, [0]

    def found(*given: object) -> tuple[torch.Tensor, ...]:
        calls[0] += 1
        values, keep, unsure = fast(*given)  # type: ignore[arg-type]
        return values + (calls[0] == 1), keep, unsure

    return found


@pytest.mark.usefixtures("draws_here")
@pytest.mark.parametrize("part", ["words", "_fast"])
def test_a_device_that_computes_otherwise_draws_nothing(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, part, wrong_stream if part == "words" else wrong_sampler())

    with pytest.raises(ModelError, match=r'set compute\.device = "cpu"'):
        noise(System(), UNITS, 8, CPU)
