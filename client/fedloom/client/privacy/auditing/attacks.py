"""Attacks on the private step itself, with made-up gradients: what a coordinator that sees every bit could use.

Each attack looks for one kind of fault that moments of the noise do not show, and is tried on a mechanism that has it,
or it could not be told from an attack that sees nothing. `rehearse` makes a short round of them before a client joins.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import chi2, norm
from torch import nn

from fedloom.client.privacy.dp_sgd.grad_sample import Tape
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import Entropy, System
from fedloom.core.errors import ConfigError, ModelError
from fedloom.core.privacy.banded import Banded
from fedloom.core.privacy.gaussian import LARGEST_DEVIATION, Integers, longest

__all__ = [
    "LIMIT",
    "Attack",
    "FloatNoise",
    "Make",
    "Paired",
    "Verdict",
    "correlated_noise",
    "dependence",
    "extreme_settings",
    "low_bits",
    "rehearse",
]

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Make = Callable[..., PrivateOptimizer]
Verdict = Literal["consistent", "blind", "VIOLATION"]

LIMIT = 8.0
"""Standard errors beyond which nothing is chance: of a million figures one is in a billion attempts."""

_CPU = torch.device("cpu")
_WIDTH = 4096
_FAINT = 2.0**-7
"""Norm of the example in `low_bits`, over C: it changes low bits, and nothing else that shows."""

_LOW_BITS_SIGMA = 0.9
"""Products with it in float32 leave gaps between them, which those with 1 would not."""

_FINE = 2.0
"""Below this noise multiplier a released float32 holds every step of the grid, so that equal values mean something."""

_EXTREME_CLIP_NORMS = (0.55 * 2.0**-149, 2.0**-149, 1.5 * 2.0**-127, 1e-30, 1e-12, 1e-6, 1e6, 1e12, 1e30)
"""Denormal numbers first: there a product with the noise multiplier may round to zero."""

_LENGTHS = (1.0, 1e15, 1e-15, 0.0)


@dataclass(frozen=True)
class Attack:
    """What one attack came to."""

    name: str
    tries: int
    """Values or releases looked at."""
    figure: str
    """What `found` and `allowed` count."""
    found: float
    """The largest of all figures, infinite when nothing hides the example."""
    allowed: float
    control_seen: bool
    """Whether the same attack succeeds on a mechanism that was broken on purpose."""

    @property
    def verdict(self) -> Verdict:
        """A violation if the figure is beyond what is allowed; blind if it could not have been."""
        if not self.found <= self.allowed:
            return "VIOLATION"
        return "consistent" if self.control_seen else "blind"


class FloatNoise(PrivateOptimizer):
    """Clips, sums and adds noise in float32 and in units of C, whatever C is: the mistake that attacks look for."""

    def __init__(self, *arguments: Any, clip_norm: float, **rest: Any) -> None:
        """As `PrivateOptimizer`, for any clip norm."""
        super().__init__(*arguments, clip_norm=1.0, **rest)
        self.max_grad_norm = clip_norm
        self._float_sum = torch.zeros(self.tape.width)

    def clip_and_accumulate(self, real: int | None = None) -> None:
        """Add up in float32."""
        factors = (self.max_grad_norm / (self.tape.norms() + 1e-6)).clamp(max=1.0)
        self._float_sum += factors[:real] @ self.tape.flat[:real]

    def add_noise(self) -> None:
        """Add a float32 multiple of sigma times C."""
        drawn = self.entropy.normal(LARGEST_DEVIATION, self.tape.width) / LARGEST_DEVIATION
        alpha = self.noise_multiplier * self.max_grad_norm
        noisy = torch.add(self._float_sum, torch.from_numpy(drawn).to(self._float_sum), alpha=alpha)
        self._float_sum.zero_()
        for parameter in self.tape.parameters:
            parameter.grad = noisy[self.tape.columns[parameter]].view_as(parameter)


class Paired:
    """Noise whose second half is the first with the opposite sign, as a wrong transform of pairs would give."""

    def __init__(self, entropy: Entropy) -> None:
        """Take the draws of `entropy`."""
        self._entropy = entropy

    def uniform(self, count: int) -> Floats:
        """As they are."""
        return self._entropy.uniform(count)

    def normal(self, deviation: int, count: int) -> Integers:
        """Half of them."""
        half = self._entropy.normal(deviation, (count + 1) // 2)
        return np.concatenate([half, -half])[:count]


def correlated_noise(
    make: Make,
    noise_multiplier: float,
    clip_norm: float,
    *,
    steps: int,
    strategy: Banded | None = None,
    entropy: Entropy | None = None,
) -> Attack:
    """Look for noise that can be subtracted: pairs, blocks and repetitions, within a step, between steps and rounds.

    Args:
        make: Makes the optimizer.
        noise_multiplier: The run's.
        clip_norm: The run's.
        steps: Empty steps in each of two rounds; with a strategy at least as many as it has bands.
        strategy: Of the run, for any number of steps. Whoever knows it takes out what it does to the noise.
        entropy: Test seam; None is the operating system's.
    """
    drawn = entropy or System()
    strategy = strategy and replace(strategy, steps=steps)
    grid = longest(_WIDTH, strategy.bands if strategy else 1)

    def found(source: Entropy) -> float:
        rounds = [_releases(make, source, noise_multiplier, clip_norm, steps, _WIDTH, strategy=strategy) for _ in "ab"]
        independent = [strategy.dense() @ each for each in rounds] if strategy else rounds
        values = np.concatenate(independent).astype(np.float64).ravel() / (noise_multiplier * clip_norm)
        # The standard error of a standard deviation of n normal values is 1 / sqrt(2 n).
        narrow = (1 - values.std()) * math.sqrt(2 * len(values))
        repeated = _repetitions(values * noise_multiplier * grid) if noise_multiplier < _FINE else 0.0
        return float(np.nanmax([narrow, repeated, dependence(values)]))

    return Attack(
        "correlated noise", 2 * steps * _WIDTH, "standard errors", found(drawn), LIMIT, found(Paired(drawn)) > LIMIT
    )


def dependence(values: Floats) -> float:
    """How far values are from independent ones, in standard errors of what is expected: the worst over all distances.

    For values and for their sizes it takes the sum of products of all values so far apart, at every distance, and of
    all values mirrored at every point; so a block that is repeated, turned round or negated shows if it is longer than
    a few times the square root of them all.

    >>> draws = np.random.default_rng(1).standard_normal(10_000)
    >>> dependence(draws) < LIMIT < dependence(np.concatenate([draws, -draws[::-1]]))
    True
    """
    worst, count = 0.0, len(values)
    for series in (values, np.abs(values)):
        spread = series.std()
        if not spread > 0:
            return math.inf
        waves = np.fft.rfft((series - series.mean()) / spread)
        apart = np.fft.irfft(np.abs(waves) ** 2, count)[1:] / math.sqrt(count)
        # Mirrored, each pair counts twice.
        mirrored = np.fft.irfft(waves**2, count) / math.sqrt(2 * count)
        worst = max(worst, float(np.abs(apart).max()), float(np.abs(mirrored).max()))
    return worst


def _repetitions(steps: Floats) -> float:
    """How many more values are of equal size than chance gives, in standard errors; `steps` are of the grid."""
    sizes = np.rint(np.abs(steps)).astype(np.int64)
    _, counts = np.unique(sizes, return_counts=True)
    pairs = float((counts * (counts - 1) // 2).sum())
    # Two normal values of deviation s are of equal size with probability 1 / (s sqrt(pi)), three with 0.368 / s².
    count, wide = len(sizes), float(steps.std()) + 1e-9
    expected = count * (count - 1) / 2 / (wide * math.sqrt(math.pi))
    return (pairs - expected) / math.sqrt(1 + expected + 0.05 * count**3 / wide**2)


def low_bits(make: Make, clip_norm: float, *, steps: int, entropy: Entropy | None = None) -> Attack:
    """Look for values that occur, or cannot occur, only when an example is there.

    The example is so short that the noise hides it well; its presence may change no bit's odds. Compared between steps
    with and without it: each low bit, as a float and as a number of steps, and whether a value is one that float32
    noise or noise on the grid gives when the sum is zero.

    Args:
        make: Makes the optimizer.
        clip_norm: C, of the run or another one.
        steps: Steps in each arm.
        entropy: Test seam; None is the operating system's.
    """
    drawn = entropy or System()
    gradient = torch.randn(_WIDTH, generator=torch.Generator().manual_seed(1), device="cpu")
    gradient *= _FAINT * clip_norm / gradient.norm()

    def found(make: Make) -> float:
        arms = [
            _marks(_releases(make, drawn, _LOW_BITS_SIGMA, clip_norm, steps, _WIDTH, example).ravel(), clip_norm)
            for example in (gradient, None)
        ]
        present, absent = (arm.mean(1) for arm in arms)
        middle = (present + absent) / 2
        error = np.sqrt(2 * middle * (1 - middle) / arms[0].shape[1])
        return float((np.abs(present - absent) / np.maximum(error, 1e-12)).max())

    return Attack("low bits", 2 * steps * _WIDTH, "standard errors", found(make), LIMIT, found(FloatNoise) > LIMIT)


def _marks(released: Singles, clip_norm: float) -> npt.NDArray[np.bool_]:
    """What an attacker reads off each value, shape (marks, values)."""
    step = np.float32(clip_norm / longest(_WIDTH))
    places = np.rint(released / step)
    marks = [places * step == released, _multiple(released, np.float32(_LOW_BITS_SIGMA * clip_norm))]
    for bit in range(4):
        marks += [(released.view(np.int32) >> bit) & 1 == 1, (places.astype(np.int64) >> bit) & 1 == 1]
    return np.stack(marks)


def _multiple(released: Singles, factor: np.float32) -> npt.NDArray[np.bool_]:
    """Whether some float32 times the factor gives this value."""
    near = released / factor
    candidates = (near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf)))
    found: npt.NDArray[np.bool_] = np.any([each * factor == released for each in candidates], axis=0)
    return found


def extreme_settings(
    make: Make, noise_multiplier: float, clip_norm: float, *, trials: int, entropy: Entropy | None = None
) -> Attack:
    """Look for clip norms at which rounding takes the noise away, or lets an example weigh more than C.

    Tried with long examples and with short ones, all along one value. A clip norm that is refused is none that a
    coordinator can use.

    Args:
        make: Makes the optimizer.
        noise_multiplier: The run's.
        clip_norm: The run's, tried beside the extremes.
        trials: Releases with the example at each setting, and as many without.
        entropy: Test seam; None is the operating system's.
    """
    drawn = entropy or System()

    def beyond(make: Make, sigma: float, clip: float, length: float) -> float:
        example = torch.zeros(4)
        example[0] = length
        try:
            present, absent = (
                _releases(make, drawn, sigma, clip, trials, 4, each)[:, 0].astype(np.float64)
                for each in (example, None)
            )
        except ConfigError:
            return 0.0
        return _beyond(present / clip, absent / clip, sigma)

    def found(make: Make) -> float:
        settings = [(noise_multiplier, clip_norm), *((_LOW_BITS_SIGMA, each) for each in _EXTREME_CLIP_NORMS)]
        return max(beyond(make, *each, length) for each in settings for length in _LENGTHS)

    tries = 2 * len(_LENGTHS) * trials * (1 + len(_EXTREME_CLIP_NORMS))
    return Attack("extreme settings", tries, "standard errors", found(make), LIMIT, found(FloatNoise) > LIMIT)


def _beyond(present: Floats, absent: Floats, sigma: float) -> float:
    """How far two arms of scores, in units of C, are from a gap of 1 at most and a deviation of sigma at least."""
    if not (np.isfinite(present).all() and np.isfinite(absent).all()):
        return math.inf
    trials, freedom = len(present), 2 * len(present) - 2
    gap = (abs(present.mean() - absent.mean()) - 1) / (sigma * math.sqrt(2 / trials))
    squares = float(trials * (present.var() + absent.var()))
    return max(float(gap), float(-norm.ppf(chi2.cdf(squares / sigma**2, freedom))))


@lru_cache(maxsize=64)
def rehearse(
    noise_multiplier: float,
    clip_norm: float,
    strategy: Banded | None = None,
    automatic: bool = False,
    device: torch.device = _CPU,
) -> None:
    """Try the attacks in short on the private step of this installation, at a run's settings; once in a process.

    Takes a second, reads no data and charges nothing.

    Args:
        noise_multiplier: The run's.
        clip_norm: The run's.
        strategy: Of noise that is spread over several steps.
        automatic: Whether every gradient is brought to the clip norm, rather than the long ones alone.
        device: Where the steps are made, and the noise with them.

    Raises:
        ModelError: One of them succeeded, or could not have.
    """
    make, bands = partial(PrivateOptimizer, automatic=automatic), strategy.bands if strategy else 1
    with device:
        attacks = (
            correlated_noise(make, noise_multiplier, clip_norm, steps=max(4, bands), strategy=strategy),
            low_bits(make, 1.0, steps=8),
            extreme_settings(make, noise_multiplier, clip_norm, trials=8),
        )
    for each in attacks:
        if each.verdict != "consistent":
            raise ModelError(
                f"the private step of this installation does not withstand an attack by {each.name}: {each.found:.3g} "
                f"{each.figure}, at most {each.allowed:g} is allowed ({each.verdict}). Do not train with it; "
                "install the released packages anew and run `fedloom audit --adversarial`"
            )


def _releases(
    make: Make,
    entropy: Entropy,
    sigma: float,
    clip: float,
    steps: int,
    width: int,
    example: torch.Tensor | None = None,
    strategy: Banded | None = None,
) -> Singles:
    """What so many steps of one round release, each over the example or over none; shape (steps, width)."""
    parameters = [nn.Parameter(torch.zeros(width // 2)) for _ in range(2)]
    tape = Tape(parameters)
    base = torch.optim.SGD(parameters, lr=0.0)
    numbers = {"noise_multiplier": sigma, "clip_norm": clip, "expected_batch": 1.0}
    optimizer = make(base, tape, entropy, strategy=strategy, **numbers)
    released = np.empty((steps, width), np.float32)
    for row in released:
        if example is not None:
            tape.begin(1)
            for parameter in parameters:
                tape.add(parameter, example[tape.columns[parameter]][None].to(parameter.device, copy=True))
            optimizer.accumulate()
        optimizer.release()
        row[:] = torch.cat([each.grad for each in parameters if each.grad is not None]).cpu().numpy()
    return released
