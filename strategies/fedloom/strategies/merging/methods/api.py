"""What a method of merging is: one layer's products and the adapters' weights in, what that layer gets out."""

import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedloom.core.errors import ConfigError
from fedloom.strategies.merging.adapter import Float64, Product

__all__ = ["Method", "Place", "check_density", "check_scaling", "places", "shares"]

_BLOCK = re.compile(r"\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Place:
    """Where a layer is in the model.

    Args:
        index: Its number among the layers that have a product, by name; tells streams of random numbers apart.
        depth: 0 in the first transformer block to 1 in the last; 0 outside of the blocks.
    """

    index: int
    depth: float


class Method(Protocol):
    """How the products of one layer become one; its options are the fields of a frozen dataclass."""

    @abstractmethod
    def merge(self, products: Sequence[Product], weights: Sequence[float], place: Place) -> Product | Float64:
        """What the layer gets: factors where the method keeps the rank low, else the dense matrix (out, in).

        Args:
            products: One of each adapter, in order.
            weights: One for each adapter, finite.
            place: Where the layer is.

        Raises:
            ConfigError: The method cannot work with these weights.
        """


def places(modules: Iterable[str]) -> dict[str, Place]:
    """The place of every layer, by its name: the first number in a name is that of its block.

    The last block is the last that has a product: an adapter on the lower half of a model ends there.

    >>> found = places(["h.0.attn", "h.4.attn", "h.2.attn", "pooler.dense"])
    >>> found["h.2.attn"].depth, found["h.4.attn"].depth, found["pooler.dense"].depth
    (0.5, 1.0, 0.0)
    """
    names = sorted(modules)
    blocks = {name: int(found[1]) if (found := _BLOCK.search(f".{name}")) else 0 for name in names}
    last = max(blocks.values(), default=0)
    return {name: Place(index, blocks[name] / last if last else 0.0) for index, name in enumerate(names)}


def shares(weights: Sequence[float]) -> list[float]:
    """Weights as parts of one.

    Raises:
        ConfigError: One is negative, or all are zero: there is no mean.

    >>> shares([1, 3])
    [0.25, 0.75]
    """
    total = float(np.sum(np.asarray(weights, np.float64)))
    if min(weights) < 0 or not total > 0:
        raise ConfigError(
            f"weights {', '.join(f'{each:g}' for each in weights)} have no mean; give weights from 0 up that are not "
            "all 0, or a method that adds, such as task-arithmetic"
        )
    return [each / total for each in weights]


def check_scaling(scaling: float) -> None:
    """Refuse a factor that is not finite or not positive.

    Raises:
        ConfigError: It is not.
    """
    if not 0 < scaling < np.inf:
        raise ConfigError(f"scaling is {scaling:g}; a number above 0 is needed")


def check_density(density: float) -> None:
    """Refuse a share of entries that keeps none, or more than all.

    Raises:
        ConfigError: It does.
    """
    if not 0 < density <= 1:
        raise ConfigError(f"density is {density:g}; a share of the entries above 0, and at most 1, is needed")
