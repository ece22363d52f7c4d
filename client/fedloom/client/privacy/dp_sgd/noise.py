"""Noise where the sum is: drawn by the CPU, or by a GPU for itself.

`rounded_normal` is the sampler of `fedloom.core.privacy.gaussian` in tensor operations. It reads the same bits in the
same comparisons with the same margins, so the same words give the same whole numbers on every device. Nothing in it
overflows int64, where the CPU's has unsigned words: see `_fast`.
"""

import os
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from fedloom.client.privacy.dp_sgd.chacha import words
from fedloom.client.privacy.dp_sgd.rng import Entropy, System
from fedloom.core.errors import ModelError
from fedloom.core.privacy import gaussian

__all__ = ["Stream", "check_device", "noise", "rounded_normal"]

Stream = Callable[[int, int], torch.Tensor]
"""Gives words `first` to `first + count - 1` of one sequence of uniform words of 64 bits, int64, shape (count,)."""

_DRAW = frozenset({"cuda"})
"""Kinds of device that draw for themselves. A CPU has instructions for AES, and takes five times as long for a value in
this way. MPS has no float64, in which candidates are accepted."""

_CHUNK = 1 << 22
"""Candidates at a time, for memory: some 500 MB."""

_OPEN = 1 << 62
"""Marks a place whose candidate is not decided; its number is added. Values are below 2^34 in size."""

_LOW, _HIGH = (1 << 32) - 1, (1 << 63) - 1


def noise(entropy: Entropy, deviation: int, count: int, device: torch.device) -> torch.Tensor:
    """`entropy.normal(deviation, count)` on a device, int64.

    The operating system's entropy has no sequence that a draw would have to follow. So there a GPU stretches a key that
    the system has just drawn, which leaves this process for the GPU alone and is used this once.

    Raises:
        ModelError: See `check_device`.
    """
    if device.type in _DRAW and isinstance(entropy, System):
        check_device(device)
        return rounded_normal(partial(words, os.urandom(32), device=device), deviation, count, device)
    return torch.from_numpy(entropy.normal(deviation, count)).to(device)


@lru_cache
def check_device(device: torch.device) -> None:
    """Hold what a GPU draws against what the CPU makes of the same key; once in a process, nothing for other devices.

    Raises:
        ModelError: They differ.
    """
    if device.type not in _DRAW:
        return
    key, count = os.urandom(32), 1 << 14
    known = Cipher(ChaCha20(key, bytes(16)), None).encryptor().update(bytes(8 * count))
    there, here = (
        rounded_normal(partial(words, key, device=each), gaussian.UNITS, count, each).cpu()
        for each in (device, torch.device("cpu"))
    )
    if words(key, 0, count, device).cpu().numpy().tobytes() != known or not torch.equal(there, here):
        raise ModelError(
            f"{device} makes other noise of a key than the CPU with torch {torch.__version__}: its integers or its exp "
            'are not what they should be; set compute.device = "cpu"'
        )


def rounded_normal(stream: Stream, deviation: int, count: int, device: torch.device) -> torch.Tensor:
    """What `gaussian.rounded_normal` draws, int64, shape (count,), count at least 1.

    Candidate i of a pass has the pass's words 2i, whose low half gives the whole part and the sign and whose high half
    decides on acceptance, and 2i + 1, the fraction. Further bits, where a candidate needs them, are the words after
    those of the pass, for one candidate after the other; then comes the next pass. One is nearly always enough, see
    `gaussian.candidates`, and waits for the device once.

    Args:
        stream: The words, on the device.
        deviation: Standard deviation before rounding, 1 to `LARGEST_DEVIATION`.
        count: How many draws.
        device: Where they are made.
    """
    gaussian.check_deviation(deviation)
    drawn: list[torch.Tensor] = []
    first, missing = 0, count
    while missing:
        some, first = _accepted(stream, first, deviation, gaussian.candidates(missing), device)
        drawn.append(some[:missing])
        missing -= len(drawn[-1])
    return torch.cat(drawn)


def _accepted(stream: Stream, first: int, deviation: int, count: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """Those of so many candidates that are accepted, in their order, and the first word that was not used.

    A boolean index would have to wait for the number of its results. So each result is written to the place that the
    number of results before it says, and what is rejected to one place behind them all.
    """
    places = torch.empty(count + 1, dtype=torch.int64, device=device)
    taken = undecided = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        values, keep, unsure = _fast(stream(first + 2 * start, 2 * size), deviation)
        values = torch.where(unsure, torch.arange(start, start + size, device=device) + _OPEN, values)
        keep |= unsure
        counted = keep.cumsum(0) + taken
        places.scatter_(0, torch.where(keep, counted - 1, count), values)
        taken, undecided = counted[-1], undecided + unsure.sum()
    # The one time to wait for the device.
    to_decide, accepted = divmod(int((undecided * (1 << 32) + taken).item()), 1 << 32)
    places, end = places[:accepted], first + 2 * count
    return _decided(stream, first, deviation, places, end) if to_decide else (places, end)


def _fast(given: torch.Tensor, deviation: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each pair of words the draw, whether it is accepted, and whether either is open.

    int64 holds everything. A shift to the right of a word brings its sign in, and the mask after it takes it out. A
    deviation is below 2^31, so that its product with a half of a word is below 2^63 - 2^32, and what is added to that
    below 2^32.
    """
    first, part = given.view(-1, 2).unbind(1)
    place, test, negative = (first >> 1) & (_LOW >> 1), (first >> 32) & _LOW, first & 1
    edges = _edges(given.device)
    whole = torch.bucketize(place, edges[1:], right=True)
    unsure = edges[whole] == place
    fraction = ((part >> 1) & _HIGH).double() * 2.0**-63
    chance = torch.exp(-0.5 * fraction * (2.0 * whole.double() + fraction))
    distance = (test.double() + 0.5) * 2.0**-32 - chance
    unsure |= distance.abs() <= gaussian.UNSURE
    # deviation · fraction + 1/2, rounded down to a multiple of 2^-32.
    scaled = deviation * ((part >> 32) & _LOW) + ((deviation * (part & _LOW)) >> 32) + (1 << 31)
    unsure |= (scaled & _LOW) == _LOW  # bits that were not drawn could still carry
    values = deviation * whole + (scaled >> 32)
    return (values ^ -negative) + negative, distance < 0, unsure


@lru_cache
def _edges(device: torch.device) -> torch.Tensor:
    """-1 and then `gaussian.edges`, so that at k is the edge that separates k from k - 1."""
    return torch.tensor([-1, *gaussian.edges()], device=device)


def _decided(
    stream: Stream, first: int, deviation: int, places: torch.Tensor, further: int
) -> tuple[torch.Tensor, int]:
    """The places when exact arithmetic has decided on those that are open, and the first word that was not used."""

    def more(count: int) -> npt.NDArray[np.uint64]:
        nonlocal further
        further += count
        return _unsigned(stream(further - count, count))

    keep = torch.ones_like(places, dtype=torch.bool)
    for place in torch.nonzero(places >= _OPEN).flatten().tolist():
        begins, part = map(int, _unsigned(stream(first + 2 * (int(places[place]) - _OPEN), 2)))
        exact = gaussian.decided(more, (begins & _LOW) >> 1, part, begins >> 32, deviation)
        keep[place] = exact is not None
        places[place] = 0 if exact is None else -exact if begins & 1 else exact
    return places[keep], further


def _unsigned(given: torch.Tensor) -> npt.NDArray[np.uint64]:
    return given.cpu().numpy().view(np.uint64)
