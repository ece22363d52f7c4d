"""How much of a round's updates is the noise of differential privacy, where that is known in advance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedloom.core.schema import Schema
from fedloom.strategies.api import Update
from fedloom.strategies.diagnostics.changes import padded, parts
from fedloom.strategies.merging.adapter import Float64

__all__ = ["NoiseShares", "noise_shares"]


@dataclass(frozen=True)
class NoiseShares:
    """Expected squared norm of the noise over the squared norm that was sent.

    About 1 says that there is nothing but noise. It is the expectation that is known and not the noise that was drawn,
    so a share may be a little above 1.

    Args:
        mean: Of the mean update, over all tensors.
        layers: Of the mean update, by module.
        clients: Of each update by itself.
    """

    mean: float
    layers: Mapping[str, float]
    clients: tuple[float, ...]


def noise_shares(schema: Schema, updates: Sequence[Update], variances: Sequence[Mapping[str, float]]) -> NoiseShares:
    """Noise shares of one round, in the values that clients send.

    The mean of K updates with weights p_k has noise of variance sum_k p_k^2 v_k in each value: that of one over K where
    all count the same.

    Args:
        schema: Of the run's adapter.
        updates: At least one.
        variances: For each update, the variance v of its noise in one value, by the tensor's role.
    """
    shares = parts(updates)
    noise: dict[str, float] = {}
    energy: dict[str, float] = {}
    own = np.zeros((len(updates), 2))
    for spec in schema.tensors:
        total: Float64 = np.zeros(spec.shape)
        for index, (update, variance) in enumerate(zip(updates, variances, strict=True)):
            if (delta := update.delta.get(spec.name)) is not None:
                expected = delta.size * variance[spec.role]
                own[index] += expected, float(np.sum(delta.astype(np.float64) ** 2))
                noise[spec.module] = noise.get(spec.module, 0.0) + shares[index] ** 2 * expected
                total += shares[index] * padded(delta, spec)
        energy[spec.module] = energy.get(spec.module, 0.0) + float(np.sum(total**2))
    layers = {module: _share(each, energy[module]) for module, each in sorted(noise.items())}
    return NoiseShares(
        _share(sum(noise.values()), sum(energy[module] for module in noise)),
        layers,
        tuple(_share(float(expected), float(sent)) for expected, sent in own),
    )


def _share(noise: float, energy: float) -> float:
    return noise / energy if energy else 0.0
