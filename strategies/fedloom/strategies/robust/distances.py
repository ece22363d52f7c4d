"""How far updates are from one another as changes of the model: the same for every way to write a low-rank product.

(B G^-1, G A) is the same model as (B, A) for every invertible G, so distances between factors mean nothing once both
have moved. Distances between products do, and need no product: with L_i R_i the change of the product by update i,
<L_i R_i, L_j R_j> = tr(L_j^T L_i R_i R_j^T), from matrices of twice the rank. Never forms B @ A.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedloom.core.schema import Array, Pair, Schema
from fedloom.strategies.api import Update

__all__ = ["squared_distances"]

Float64 = npt.NDArray[np.float64]


def squared_distances(schema: Schema, updates: Sequence[Update]) -> Float64:
    """Squared Frobenius distances between the models the updates lead to, over all trained tensors together.

    Low-rank pairs count by the change of scale * B @ A, whichever factors moved; other tensors by their values.
    Beside the updates, memory is one tensor's (or pair's) values of all of them in float64.

    Args:
        schema: Schema of the global adapter.
        updates: At least one; all from the same start and of the same tensors.

    Returns:
        Shape (n, n), symmetric, at least 0. The rounding is relative to the squared norms of the two
        changes, so that one huge update does not blur the distances between the others.
    """
    products = np.zeros((len(updates), len(updates)))
    others = set(updates[0].delta)
    for pair in schema.pairs:
        moved = others & {pair.a, pair.b}
        others -= moved
        if len(moved) == 2:
            products += schema.scale**2 * _by_grams(pair, updates)
        elif moved:
            products += schema.scale**2 * _inner([_one_factor(pair, each) for each in updates])
    for name in sorted(others):
        products += _inner([each.delta[name] for each in updates])
    products = (products + products.T) / 2
    norms = np.diag(products)
    distances: Float64 = np.maximum(norms[:, None] + norms[None] - 2 * products, 0.0)
    return distances


def _inner(values: Sequence[Array]) -> Float64:
    """Inner products of arrays of equal shape, each with each."""
    flat = np.stack([each.ravel() for each in values]).astype(np.float64)
    products: Float64 = flat @ flat.T
    return products


def _one_factor(pair: Pair, update: Update) -> Float64:
    """Coordinates of the product's change in an orthonormal basis, where one factor rests and is shared.

    With A^T = Q R the change dB @ A is (dB R^T) Q^T, whose norm is that of dB R^T; mirrored where B rests.
    """
    if pair.b in update.delta:
        _, r = np.linalg.qr(update.start[pair.a].astype(np.float64).T)
        return np.asarray(update.delta[pair.b].astype(np.float64) @ r.T)
    _, r = np.linalg.qr(update.start[pair.b].astype(np.float64))
    return np.asarray(r @ update.delta[pair.a].astype(np.float64))


def _by_grams(pair: Pair, updates: Sequence[Update]) -> Float64:
    """Inner products of the products' changes, dB (A + dA) + B dA = [dB, B] [A + dA; dA], by their r x r Grams."""
    lefts, rights = [], []
    for update in updates:
        b, a = (update.start[name].astype(np.float64) for name in (pair.b, pair.a))
        db, da = (update.delta[name].astype(np.float64) for name in (pair.b, pair.a))
        lefts.append(np.concatenate([db, b], axis=1))
        rights.append(np.concatenate([a + da, da]))
    left, right = np.concatenate(lefts, axis=1), np.concatenate(rights)
    count, rank = len(updates), lefts[0].shape[1]
    rows = [
        # One row at a time: all Grams at once would be (n r)^2 values.
        ((lefts[i].T @ left) * (rights[i] @ right.T)).reshape(rank, count, rank).sum(axis=(0, 2))
        for i in range(count)
    ]
    return np.stack(rows)
