"""Adapters into one: every layer by a method, truncated to one rank, and the tensors beside them averaged."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedloom.core.errors import ConfigError, SchemaError
from fedloom.core.schema import Array
from fedloom.strategies.merging.adapter import FinishedAdapter
from fedloom.strategies.merging.methods.api import Method, places, shares
from fedloom.strategies.merging.truncate import Truncated, truncate

__all__ = ["Layer", "Merged", "Rank", "merge"]


@dataclass(frozen=True)
class Rank:
    """What rank the merged adapter gets: the least at which every layer keeps a share of its energy.

    Args:
        most: Most directions of a layer, 1 or more, whatever they hold; None for no such bound.
        energy: Share of each layer's energy (of its squared singular values) that is kept, above 0 to 1.

    Raises:
        ConfigError: A value is out of range.
    """

    most: int | None = None
    energy: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a rank or a share that keeps nothing."""
        if self.most is not None and self.most < 1:
            raise ConfigError(f'rank is {self.most}; an integer from 1 up, or "exact", is needed')
        if not 0 < self.energy <= 1:
            raise ConfigError(f"energy is {self.energy:g}; a share above 0, and at most 1, is needed")


@dataclass(frozen=True)
class Layer:
    """What became of one layer.

    Args:
        module: Its name.
        rank: Directions that it keeps; the adapter's others are zero.
        norm: Frobenius norm of what the method gave.
        lost: Frobenius norm of what truncation took from that.
    """

    module: str
    rank: int
    norm: float
    lost: float

    @property
    def error(self) -> float:
        """Relative error of the truncation, 0 to 1."""
        return self.lost / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Merged:
    """A merged adapter, whose products all have the same rank, and what was lost to it."""

    adapter: FinishedAdapter
    layers: tuple[Layer, ...]

    @property
    def error(self) -> float:
        """Relative error of the truncation over all layers together, 0 to 1."""
        norm = math.hypot(*(each.norm for each in self.layers))
        return math.hypot(*(each.lost for each in self.layers)) / norm if norm else 0.0


def merge(
    adapters: Sequence[FinishedAdapter],
    method: Method,
    weights: Sequence[float] | None = None,
    rank: Rank | None = None,
) -> Merged:
    """One adapter of several.

    Tensors that an adapter has whole, such as a head, have no product and, without the base model, no change: every
    method averages them, by the weights that are positive.

    Args:
        adapters: At least one; with products of the same layers and shapes, and the same whole tensors.
        method: What to do with each layer.
        weights: One for each adapter, finite; None for 1 each.
        rank: Of the result; None for all that the method gives, but at most the sum of the adapters' ranks.

    Raises:
        ConfigError: The weights do not fit the adapters or the method; or the rank would be beyond what an adapter
            can have.
        SchemaError: The adapters do not fit each other.
    """
    chosen = [1.0] * len(adapters) if weights is None else list(weights)
    if len(chosen) != len(adapters) or not all(map(math.isfinite, chosen)):
        raise ConfigError(
            f"{len(adapters)} adapters and the weights {', '.join(f'{each:g}' for each in chosen)}; give one finite "
            "number for each adapter"
        )
    _check(adapters)
    first, target = adapters[0], rank or Rank(sum(each.rank for each in adapters))
    found: dict[str, Truncated] = {}
    for module, place in places(first.products).items():
        update = method.merge([each.products[module] for each in adapters], chosen, place)
        found[module] = truncate(update, target.most, target.energy)
    widest = max((each.product.rank for each in found.values()), default=0)
    products = {module: found[module].product.padded(widest) for module in first.products}
    layers = tuple(Layer(module, each.product.rank, each.norm, each.lost) for module, each in found.items())
    return Merged(FinishedAdapter(products, _averaged([each.whole for each in adapters], chosen)), layers)


def _averaged(wholes: Sequence[Mapping[str, Array]], weights: Sequence[float]) -> dict[str, Array]:
    if not wholes[0]:
        return {}
    parts = shares([max(each, 0.0) for each in weights])
    return {
        name: sum((p * each[name] for p, each in zip(parts, wholes, strict=True)), np.zeros(value.shape, np.float64))
        for name, value in wholes[0].items()
    }


def _check(adapters: Sequence[FinishedAdapter]) -> None:
    """Refuse adapters of other layers or shapes than the first."""
    kinds = [
        {name: (len(each.b), each.a.shape[1]) for name, each in adapter.products.items()}
        | {name: each.shape for name, each in adapter.whole.items()}
        for adapter in adapters
    ]
    for number, kind in enumerate(kinds[1:], start=2):
        if odd := sorted(name for name in kind.keys() | kinds[0].keys() if kind.get(name) != kinds[0].get(name)):
            name = odd[0]
            raise SchemaError(
                f"adapter 1 has {kinds[0].get(name, 'no tensor')} and adapter {number} {kind.get(name, 'no tensor')} "
                f"at {name}; merge adapters of the same layers and labels"
            )
