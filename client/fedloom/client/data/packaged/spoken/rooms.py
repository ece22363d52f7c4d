"""What is heard beside a voice in four rooms."""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

__all__ = ["NOISES", "RATE", "Wave", "heard_in"]

RATE = 22050
"""Samples in a second, as eSpeak NG gives them."""
_PEAK = 0.5

Wave = npt.NDArray[np.float64]
"""Samples; 1 is the loudest that a file holds."""


def heard_in(voice: Wave, noise: str, level: float, draw: np.random.Generator) -> Wave:
    """A voice with a pause before and after it and a noise beside it, as loud as a microphone happens to take it.

    Args:
        voice: Any samples that are not all zero.
        noise: One of `NOISES`.
        level: How loud that is, as a share of the voice.
        draw: What decides on all the rest.
    """
    before, after = draw.integers(RATE // 20, RATE // 5, 2)
    voice = np.pad(voice, (before, after))
    beside = NOISES[noise](voice, draw)
    heard: Wave = voice + level * np.sqrt((voice**2).mean() / (beside**2).mean()) * beside
    heard *= _PEAK * draw.uniform(0.4, 1.0) / np.abs(heard).max()
    return heard


def _monitor(voice: Wave, draw: np.random.Generator) -> Wave:
    """A tone at each beat of a heart."""
    beat, seconds = draw.uniform(0.6, 1.0), np.arange(len(voice)) / RATE + draw.uniform(0, 1)
    tone: Wave = np.sin(2 * np.pi * 880 * seconds) * (seconds % beat < 0.1)
    return tone + 0.1 * draw.normal(size=len(voice))


def _crowd(voice: Wave, draw: np.random.Generator) -> Wave:
    """Low noise that swells and fades about as fast as syllables do."""
    low = np.convolve(draw.normal(size=len(voice)), np.full(16, 1 / 16), "same")
    knots = draw.uniform(0.2, 1.0, len(voice) // 2000 + 2)
    swell: Wave = np.interp(np.arange(len(voice)) / 2000, np.arange(len(knots)), knots)
    return low * swell


def _hum(voice: Wave, draw: np.random.Generator) -> Wave:
    """Mains and ventilation."""
    seconds = np.arange(len(voice)) / RATE + draw.uniform(0, 1)
    hum: Wave = 0.5 * draw.normal(size=len(voice))
    for overtone in (1, 2, 3, 4):
        hum += np.sin(2 * np.pi * 50 * overtone * seconds) / overtone
    return hum


def _hall(voice: Wave, draw: np.random.Generator) -> Wave:
    """Echoes of the voice, and a little hiss."""
    heard: Wave = 0.1 * np.sqrt((voice**2).mean()) * draw.normal(size=len(voice))
    for seconds in draw.uniform(0.02, 0.15, 8):
        late = int(RATE * seconds)
        heard[late:] += np.exp(-seconds / 0.06) * voice[:-late]
    return heard


NOISES: Mapping[str, Callable[[Wave, np.random.Generator], Wave]] = {
    "monitor": _monitor,
    "crowd": _crowd,
    "hum": _hum,
    "hall": _hall,
}
"""What makes a noise as long as a voice."""
