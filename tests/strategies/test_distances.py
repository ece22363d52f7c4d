"""Distances between updates against dense products, and under every change of the factors that keeps the product."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from fedloom.core.schema import LORA, Array, Role, Schema, TensorSpec
from fedloom.strategies.api import Update
from fedloom.strategies.robust.distances import squared_distances

SCHEMA = Schema(
    (
        TensorSpec("m.A", "m", Role.LORA_A, (3, 9)),
        TensorSpec("m.B", "m", Role.LORA_B, (7, 3)),
        TensorSpec("n.A", "n", Role.LORA_A, (3, 4)),
        TensorSpec("n.B", "n", Role.LORA_B, (2, 3)),
        TensorSpec("head", "head", Role.HEAD, (2, 5)),
    ),
    scale=0.5,
)
EVERY = frozenset({*LORA, Role.HEAD})


def start(seed: int = 0) -> dict[str, Array]:
    draw = np.random.default_rng(seed)
    return {spec.name: draw.normal(size=spec.shape).astype(np.float32) for spec in SCHEMA.tensors}


def clients(roles: frozenset[str], count: int = 6) -> list[Update]:
    begin = start()
    specs = SCHEMA.select(roles).tensors
    draw = np.random.default_rng(7)
    return [
        Update(f"c{k}", 1.0, begin, {s.name: draw.normal(0, 0.3, s.shape).astype(np.float32) for s in specs})
        for k in range(count)
    ]


def model(update: Update) -> npt.NDArray[np.float64]:
    """All that the model computes with, densely and as one vector."""
    values = {n: update.value(n) if n in update.delta else t.astype(np.float64) for n, t in update.start.items()}
    products = [0.5 * values[f"{m}.B"] @ values[f"{m}.A"] for m in ("m", "n")]
    return np.concatenate([each.ravel() for each in (*products, values["head"])])


def dense(updates: Sequence[Update]) -> npt.NDArray[np.float64]:
    flat = np.stack([model(each) for each in updates])
    distances: npt.NDArray[np.float64] = np.square(flat[:, None] - flat[None]).sum(axis=2)
    return distances


@pytest.mark.parametrize(
    "roles", [EVERY, LORA, frozenset({Role.LORA_B}), frozenset({Role.LORA_A, Role.HEAD}), frozenset({Role.HEAD})]
)
def test_they_are_those_of_the_dense_products(roles: frozenset[str]) -> None:
    updates = clients(roles)

    found = squared_distances(SCHEMA, updates)

    np.testing.assert_allclose(found, dense(updates), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(found, found.T)


def regauged(update: Update, seed: int) -> Update:
    """The same product in other factors, (B G^-1, G A), as the client could have sent it."""
    delta = dict(update.delta)
    for module in ("m", "n"):
        gauge = np.random.default_rng(seed).normal(size=(3, 3)) + 2 * np.eye(3)
        b, a = update.value(f"{module}.B") @ np.linalg.inv(gauge), gauge @ update.value(f"{module}.A")
        for name, value in ((f"{module}.B", b), (f"{module}.A", a)):
            delta[name] = (value - update.start[name]).astype(np.float32)
    return Update(update.client, update.weight, update.start, delta)


def test_they_do_not_see_how_a_product_is_written() -> None:
    updates = clients(EVERY)
    turned = [regauged(update, 50 + k) for k, update in enumerate(updates)]
    raw = np.abs(np.stack([t.delta["m.B"] - u.delta["m.B"] for t, u in zip(turned, updates, strict=True)]))

    found = squared_distances(SCHEMA, turned)

    assert raw.max() > 1
    np.testing.assert_allclose(found, squared_distances(SCHEMA, updates), rtol=1e-4, atol=1e-4)


def test_one_huge_update_does_not_blur_the_others() -> None:
    updates = clients(EVERY)
    huge = Update("z", 1.0, updates[0].start, {n: np.full_like(t, 1e30) for n, t in updates[0].delta.items()})

    found = squared_distances(SCHEMA, [*updates, huge])

    np.testing.assert_allclose(found[:-1, :-1], dense(updates), rtol=1e-9, atol=1e-9)
    assert np.isfinite(found).all()
    assert found[-1, :-1].min() > 1e60


def test_a_small_move_of_a_large_product_keeps_its_digits() -> None:
    """Distances come from changes, so the size of the model that all clients start from does not matter."""
    begin = {name: 1e3 * tensor for name, tensor in start().items()}
    updates = [
        Update(u.client, 1.0, begin, {n: np.float32(1e-3) * t for n, t in u.delta.items()}) for u in clients(LORA)
    ]

    np.testing.assert_allclose(squared_distances(SCHEMA, updates), dense(updates), rtol=1e-6)
