"""Intruder dimensions: new leading directions of a weight (Shuttleworth et al., 2024, arXiv 2410.21228)."""

import numpy as np

from fedloom.core.errors import SchemaError
from fedloom.strategies.merging.adapter import Float64, Product

__all__ = ["LEADING", "SIMILAR", "intruder_dimensions"]

LEADING = 10
"""Singular vectors of the changed weight that are looked at, the paper's k."""

SIMILAR = 0.5
"""Cosine from which a direction is one that the pretrained weight had, the paper's epsilon."""


def intruder_dimensions(weight: Float64, change: Product, leading: int = LEADING, similar: float = SIMILAR) -> int:
    """How many of the leading left singular vectors u_j of W0 + B A are like none of W0's: max_i |u_j . u_i| < similar.

    Two SVDs of the layer's weight in float64: a second at width 1024, minutes at 8192.

    Args:
        weight: W0, shape (out, in).
        change: What the adapter adds.
        leading: k, at least 1.
        similar: Cosine in [0, 1].

    Returns:
        0 to `leading`.

    Raises:
        SchemaError: The change is of a layer of another shape.

    Source: Shuttleworth et al., 2024, arXiv 2410.21228, definition 1 and algorithm 1.
    """
    shape = len(change.b), change.a.shape[1]
    if weight.shape != shape:
        raise SchemaError(
            f"a weight of shape {weight.shape} and a change of {shape}; give the adapter's own base model"
        )
    before, _, _ = np.linalg.svd(weight, full_matrices=False)
    after, _, _ = np.linalg.svd(weight + change.dense(), full_matrices=False)
    likest = np.abs(before.T @ after[:, :leading]).max(axis=0)
    return int(np.sum(likest < similar))
