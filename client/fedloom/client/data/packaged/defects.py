"""Made-up grey pictures of metal surfaces: which defect is on them."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedloom.client.data.packaged.api import Split
from fedloom.client.data.records import Record

__all__ = ["Defects"]

_SIDE = 56
"""Pixels."""
_PICTURES = {"train": 600, "test": 100}
"""Of each plant."""
_KINDS = ("none", "scratch", "hole", "stain")

_Picture = npt.NDArray[np.float64]
"""Shape (56, 56), 0 is black and 1 is white."""


@dataclass(frozen=True)
class _Plant:
    """How the surfaces of one plant look, and which defects it has most."""

    light: float
    """Mean brightness."""
    slope: float
    """Difference in brightness between two opposite edges."""
    grain: float
    """Standard deviation of the noise of the sensor."""
    stripes: float
    """Amplitude of the marks of brushing or rolling."""
    mix: tuple[float, ...]
    """How often each kind occurs."""


_PLANTS = {
    "casting": _Plant(0.45, 0.10, 0.07, 0.00, (0.4, 0.1, 0.4, 0.1)),
    "brushing": _Plant(0.60, 0.05, 0.03, 0.07, (0.4, 0.4, 0.1, 0.1)),
    "coating": _Plant(0.75, 0.20, 0.02, 0.00, (0.4, 0.15, 0.05, 0.4)),
    "rolling": _Plant(0.55, 0.15, 0.04, 0.04, (0.4, 0.2, 0.2, 0.2)),
}


@dataclass(frozen=True)
class Defects:
    """Surfaces of four plants with a scratch, a hole, a stain, or none, 56 by 56 grey pixels; drawn from a seed.

    Kinds as in the surface data of Song & Yan (Applied Surface Science 2013). Each picture has its own place, size,
    angle and contrast of the defect and its own noise, so that none of the held-out ones is among those to train on.
    """

    task: ClassVar[str] = "image-classification"

    def records(self, split: Split) -> Iterator[Record]:
        """The pictures of one split, plant by plant."""
        from PIL import Image  # listing this source takes no picture library

        for place, (name, plant) in enumerate(_PLANTS.items()):
            draw = np.random.default_rng([place, split == "test"])
            for number in range(1, _PICTURES[split] + 1):
                kind = _KINDS[draw.choice(len(_KINDS), p=plant.mix)]
                pixels = _picture(plant, kind, draw)
                file = io.BytesIO()
                Image.fromarray(np.round(255 * pixels).astype(np.uint8)).save(file, "BMP")
                yield Record(f"defects {split} {name} {number}", "", kind, name, image=file.getvalue())


def _picture(plant: _Plant, kind: str, draw: np.random.Generator) -> _Picture:
    """A surface with one defect, or without."""
    down, right = np.mgrid[:_SIDE, :_SIDE] / _SIDE - 0.5
    angle = draw.uniform(0, 2 * np.pi)
    surface = plant.light + plant.slope * (np.cos(angle) * down + np.sin(angle) * right)
    surface = surface + plant.stripes * np.repeat(draw.normal(size=(_SIDE, 1)), _SIDE, 1)
    if kind == "scratch":
        surface = surface + _scratch(down, right, draw)
    elif kind == "hole":
        surface = surface * (1 - _disc(down, right, draw.uniform(0.06, 0.13), 0.015, draw) * draw.uniform(0.7, 0.95))
    elif kind == "stain":
        surface = surface * (1 - _disc(down, right, draw.uniform(0.16, 0.28), 0.06, draw) * draw.uniform(0.25, 0.45))
    seen: _Picture = np.clip(surface + plant.grain * draw.normal(size=surface.shape), 0, 1)
    return seen


def _scratch(down: _Picture, right: _Picture, draw: np.random.Generator) -> _Picture:
    """A thin line, bright with a dark edge."""
    angle, start = draw.uniform(0, np.pi), draw.uniform(-0.15, 0.15, 2)
    along = np.cos(angle) * (down - start[0]) + np.sin(angle) * (right - start[1])
    across = (
        -np.sin(angle) * (down - start[0]) + np.cos(angle) * (right - start[1]) + draw.uniform(-0.5, 0.5) * along**2
    )
    length, width = draw.uniform(0.2, 0.45), draw.uniform(0.015, 0.03)
    line: _Picture = (np.abs(along) < length) * np.exp(-((across / width) ** 2))
    edge: _Picture = (np.abs(along) < length) * np.exp(-(((across - 2 * width) / width) ** 2))
    return draw.uniform(0.25, 0.45) * (line - 0.8 * edge)


def _disc(down: _Picture, right: _Picture, radius: float, blur: float, draw: np.random.Generator) -> _Picture:
    """1 within a wavy circle and 0 outside, shape (56, 56); `blur` is the width of its edge as a share of the side."""
    place = draw.uniform(-0.25, 0.25, 2)
    angle = np.arctan2(down - place[0], right - place[1])
    waves = sum(draw.normal(0, 0.08) * np.cos(k * angle + draw.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    away = np.hypot(down - place[0], right - place[1]) - radius * (1 + waves)
    disc: _Picture = 1 / (1 + np.exp(away / (blur / 4)))
    return disc
