"""How fast simulated clients are and when they are there: functions of the section, its seed and a client's name."""

import hashlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedloom.core.config.virtual_time import VirtualTimeSection
from fedloom.simulation.virtual_time.trace import Session, read_trace

__all__ = ["Device", "devices"]

_SPEED, _NETWORK, _SESSIONS, _DROPOUTS = range(4)
"""Streams of draws: top word of the Philox counter, so that none shares numbers with another."""


@dataclass(frozen=True)
class Device:
    """What one client runs on."""

    name: str
    section: VirtualTimeSection
    step_s: float
    """Seconds that an optimiser step takes it, where no trace says otherwise."""
    line: float
    """Speed of its line over that of the median client."""
    traced: tuple[Session, ...] = ()
    """When it is there, by a trace."""

    def sessions(self) -> Iterator[Session]:
        """When it is there, from time 0 on; each call begins anew."""
        if self.traced:
            yield from self.traced
        elif self.section.mean_on_s is None or self.section.mean_off_s is None:
            yield Session(0.0)
        else:
            yield from self._drawn(self.section.mean_on_s, self.section.mean_off_s)

    def _drawn(self, mean_on_s: float, mean_off_s: float) -> Iterator[Session]:
        """Of a process of two states, which is in equilibrium at time 0."""
        draws = _draws(self.section, self.name, _SESSIONS)
        start_s, there = 0.0, draws.random() < mean_on_s / (mean_on_s + mean_off_s)
        while True:
            end_s = start_s + draws.exponential(mean_on_s if there else mean_off_s)
            if there:
                yield Session(start_s, end_s)
            start_s, there = end_s, not there

    @property
    def at_start(self) -> bool:
        """Whether it is there at time 0."""
        return next(self.sessions()).start_s == 0

    def download_s(self, size_bytes: int) -> float:
        """Seconds for so many bytes from the coordinator."""
        return self._transfer_s(size_bytes, self.section.download_mbps)

    def upload_s(self, size_bytes: int) -> float:
        """Seconds for so many bytes to the coordinator."""
        return self._transfer_s(size_bytes, self.section.upload_mbps)

    def _transfer_s(self, size_bytes: int, median_mbps: float | None) -> float:
        return 0.0 if median_mbps is None else 8e-6 * size_bytes / (median_mbps * self.line)

    def dropout(self, number: int) -> float | None:
        """The share of its assignment with this number, from 0, after which it falls silent; None if it does not."""
        draws = _draws(self.section, self.name, _DROPOUTS, number)
        return draws.random() if draws.random() < self.section.dropout_rate else None


def devices(section: VirtualTimeSection, names: Collection[str]) -> dict[str, Device]:
    """Every client's device, by its name.

    Args:
        section: The run file's.
        names: The clients.

    Raises:
        ConfigError: The trace cannot be read, or lacks a client.
    """
    traced = {} if section.trace is None else read_trace(Path(section.trace), names)

    def factor(name: str, stream: int, spread: float) -> float:
        return math.exp(spread * _draws(section, name, stream).standard_normal())

    return {
        name: Device(
            name,
            section,
            section.step_s * factor(name, _SPEED, section.step_spread),
            factor(name, _NETWORK, section.network_spread),
            traced.get(name, ()),
        )
        for name in names
    }


def _draws(section: VirtualTimeSection, name: str, stream: int, number: int = 0) -> np.random.Generator:
    key = section.seed << 64 | int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, number, stream]))
