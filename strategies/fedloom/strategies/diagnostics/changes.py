"""The updates of one round as changes of the model: their mean, what averaging factors loses of it, their distances.

Everything goes by inner products of low-rank products, <B A, D C> = tr((B^T D)(C A^T)), from r x r matrices: no product
is formed, however large the layers are and however many clients there are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedloom.core.schema import Array, Pair, Schema, Tensors, TensorSpec
from fedloom.strategies.api import Update
from fedloom.strategies.merging.adapter import Float64, Product

__all__ = ["LayerChange", "RoundChanges", "inner_products", "padded", "parts", "result_products", "round_changes"]


@dataclass(frozen=True)
class LayerChange:
    """One layer of one round.

    Args:
        module: Its name.
        change: Frobenius norm of the mean change, sum_k p_k (W_k - W).
        error: Aggregation error of averaging factors, |sum_k p_k s B_k A_k - s B A|_F with B and A the means of the
            factors; 0 where one factor is shared, and None of a layer that is no pair.
        spread: Root mean square distance between two clients' weights; None of one client.
    """

    module: str
    change: float
    error: float | None
    spread: float | None


@dataclass(frozen=True)
class RoundChanges:
    """All layers of one round.

    Args:
        layers: By name.
        inner: Inner products of the clients' changes over all layers together, shape (n, n).
    """

    layers: tuple[LayerChange, ...]
    inner: Float64

    @property
    def distances(self) -> Float64:
        """Frobenius distances between the clients' models, shape (n, n)."""
        return np.asarray(np.sqrt(_squared_distances(self.inner)))


def round_changes(schema: Schema, updates: Sequence[Update]) -> RoundChanges:
    """What the updates of one round change, layer by layer.

    A pair counts by its product, whichever factors moved; other tensors by their values. Where a client keeps one of
    the factors to itself its product is not known, and the other counts by its values too.

    The error is that of Sun et al., ICLR 2024, arXiv 2403.12313, in its covariance form: sum_k p_k B_k A_k - B A =
    sum_k p_k (B_k - B)(A_k - A).

    Args:
        schema: Of the run's adapter.
        updates: At least one.
    """
    shares, count = parts(updates), len(updates)
    others = {spec.name: spec for spec in schema.tensors if any(spec.name in each.delta for each in updates)}
    inner: dict[str, Float64] = {}
    errors: dict[str, float] = {}
    for pair in schema.pairs:
        moved = others.keys() & {pair.a, pair.b}
        if not moved or not all({pair.a, pair.b} <= each.start.keys() for each in updates):
            continue
        specs = {spec.name: spec for spec in schema.tensors if spec.name in (pair.a, pair.b)}
        inner[pair.module] = inner_products([_change(pair, each, schema.scale) for each in updates])
        errors[pair.module] = _error(pair, specs, updates, shares, schema.scale)
        for name in moved:
            del others[name]
    for spec in others.values():
        flat = np.stack([padded(each.delta.get(spec.name), spec).ravel() for each in updates])
        inner[spec.module] = inner.get(spec.module, np.zeros((count, count))) + flat @ flat.T
    layers = [
        LayerChange(module, _norm(each, shares), errors.get(module), _spread(each))
        for module, each in sorted(inner.items())
    ]
    return RoundChanges(tuple(layers), sum(inner.values(), np.zeros((count, count))))


def inner_products(products: Sequence[Product]) -> Float64:
    """Inner products of products of one layer, each with each, shape (n, n); their ranks may differ.

    >>> one = Product(np.array([[1.0], [2.0]]), np.array([[3.0, 0.0]]))
    >>> inner_products([one, Product(-one.b, one.a)]).tolist()
    [[45.0, -45.0], [-45.0, 45.0]]
    """
    left, right = np.concatenate([each.b for each in products], axis=1), np.concatenate([each.a for each in products])
    begins = np.cumsum([0, *(each.rank for each in products[:-1])])
    # One row at a time: all Grams at once would be (n r)^2 values.
    rows = [np.add.reduceat(((each.b.T @ left) * (each.a @ right.T)).sum(axis=0), begins) for each in products]
    found = np.stack(rows)
    return np.asarray((found + found.T) / 2)


def parts(updates: Sequence[Update]) -> Float64:
    """What each update counts in the mean, as parts of one."""
    weights = np.array([each.weight for each in updates])
    return np.asarray(weights / weights.sum())


def padded(value: Array | None, spec: TensorSpec) -> Float64:
    """A client's tensor in the size of the schema's: zero beyond its rank, and where it has none."""
    whole = np.zeros(spec.shape)
    if value is not None:
        whole[tuple(slice(0, size) for size in value.shape)] = value
    return whole


def result_products(schema: Schema, result: Tensors) -> dict[str, Product]:
    """What a result of a run adds to each layer, corrections of the frozen weight included, by module.

    Args:
        schema: Of the run's adapter.
        result: See `Strategy.result`.
    """
    found: dict[str, Product] = {}
    for pair in schema.pairs:
        corrections = (f"{pair.module}.base_B", f"{pair.module}.base_A")
        names = [(pair.b, pair.a), *([corrections] if corrections[0] in result else [])]
        b = np.concatenate([schema.scale * result[b].astype(np.float64) for b, _ in names], axis=1)
        found[pair.module] = Product(b, np.concatenate([result[a].astype(np.float64) for _, a in names]))
    return found


def _change(pair: Pair, update: Update, scale: float) -> Product:
    """The change s (B + dB)(A + dA) - s B A, of the factors that moved."""
    b, a = (update.start[name].astype(np.float64) for name in (pair.b, pair.a))
    db, da = (update.delta.get(name) for name in (pair.b, pair.a))
    lefts, rights = [], []
    if db is not None:
        lefts.append(scale * db.astype(np.float64))
        rights.append(a if da is None else a + da)
    if da is not None:
        lefts.append(scale * b)
        rights.append(da.astype(np.float64))
    if not lefts:
        return Product(np.zeros((len(b), 1)), np.zeros((1, a.shape[1])))
    return Product(np.concatenate(lefts, axis=1), np.concatenate(rights))


def _error(
    pair: Pair, specs: Mapping[str, TensorSpec], updates: Sequence[Update], shares: Float64, scale: float
) -> float:
    """|sum_k p_k s (B_k - B)(A_k - A)|_F."""
    factors: dict[str, Float64] = {}
    for name in (pair.b, pair.a):
        values = np.stack(
            [padded(each.start[name], specs[name]) + padded(each.delta.get(name), specs[name]) for each in updates]
        )
        # About the first, not about zero: of values that are all the same nothing is left, not even rounding.
        apart = values - values[0]
        factors[name] = apart - np.tensordot(shares, apart, axes=1)
    deviations = [Product(scale * b, a) for b, a in zip(factors[pair.b], factors[pair.a], strict=True)]
    return _norm(inner_products(deviations), shares)


def _norm(inner: Float64, shares: Float64) -> float:
    return float(np.sqrt(max(float(shares @ inner @ shares), 0.0)))


def _squared_distances(inner: Float64) -> Float64:
    norms = np.diag(inner)
    return np.asarray(np.maximum(norms[:, None] + norms[None] - 2 * inner, 0.0))


def _spread(inner: Float64) -> float | None:
    count = len(inner)
    return float(np.sqrt(_squared_distances(inner).sum() / (count * (count - 1)))) if count > 1 else None
