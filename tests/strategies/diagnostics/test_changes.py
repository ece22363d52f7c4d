"""What a round's updates change, from Grams against dense weights."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from fedloom.core.schema import LORA, Array, Role, Schema, TensorSpec
from fedloom.strategies.api import Update
from fedloom.strategies.diagnostics.changes import inner_products, result_products, round_changes
from fedloom.strategies.merging.adapter import Product
from fedloom.strategies.robust.distances import squared_distances

Float64 = npt.NDArray[np.float64]
SCHEMA = Schema(
    (
        TensorSpec("m.A", "m", Role.LORA_A, (3, 9)),
        TensorSpec("m.B", "m", Role.LORA_B, (7, 3)),
        TensorSpec("n.A", "n", Role.LORA_A, (3, 4)),
        TensorSpec("n.B", "n", Role.LORA_B, (2, 3)),
        TensorSpec("head.weight", "head", Role.HEAD, (2, 5)),
        TensorSpec("head.bias", "head", Role.HEAD, (2,)),
    ),
    scale=0.5,
)
EVERY = frozenset({*LORA, Role.HEAD})
WEIGHTS = (1.0, 5.0, 2.0, 2.0)


def clients(roles: frozenset[str] = EVERY, ranks: tuple[int, ...] = (3, 3, 3, 3)) -> list[Update]:
    draw = np.random.default_rng(7)
    start = {spec.name: draw.normal(size=spec.shape).astype(np.float32) for spec in SCHEMA.tensors}
    made = []
    for index, (weight, rank) in enumerate(zip(WEIGHTS, ranks, strict=True)):
        cut = SCHEMA.with_rank(rank)
        begun = {spec.name: start[spec.name][tuple(map(slice, spec.shape))] for spec in cut.tensors}
        delta = {spec.name: draw.normal(0, 0.3, spec.shape).astype(np.float32) for spec in cut.select(roles).tensors}
        made.append(Update(f"c{index}", weight, begun, delta))
    return made


def value(update: Update, name: str) -> Float64:
    return np.asarray(update.value(name) if name in update.delta else update.start[name], np.float64)


def weight(update: Update, module: str) -> Float64:
    """What the layer adds to the model, densely."""
    if module == "head":
        return np.concatenate([value(update, f"head.{name}").ravel() for name in ("weight", "bias")])
    return np.asarray(0.5 * value(update, f"{module}.B") @ value(update, f"{module}.A"), np.float64)


def padded(values: list[Float64], shape: tuple[int, ...]) -> list[Float64]:
    return [np.pad(each, [(0, size - have) for size, have in zip(shape, each.shape, strict=True)]) for each in values]


@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (1, 3, 2, 3)])
@pytest.mark.parametrize("roles", [EVERY, frozenset({Role.LORA_B}), frozenset({Role.LORA_A, Role.HEAD})])
def test_every_figure_is_that_of_dense_weights(roles: frozenset[str], ranks: tuple[int, ...]) -> None:
    updates = clients(roles, ranks)
    still = [replace(each, delta={}) for each in updates]
    shares = np.array(WEIGHTS) / sum(WEIGHTS)

    found = round_changes(SCHEMA, updates)

    modules = ["head", "m", "n"] if Role.HEAD in roles else ["m", "n"]
    assert [each.module for each in found.layers] == modules
    total = np.zeros((4, 4))
    for layer in found.layers:
        moved = [weight(one, layer.module) - weight(two, layer.module) for one, two in zip(updates, still, strict=True)]
        mean = sum(p * each for p, each in zip(shares, moved, strict=True))
        assert layer.change == pytest.approx(np.linalg.norm(mean), rel=1e-9)
        apart = np.array([[np.sum((one - two) ** 2) for two in moved] for one in moved])
        assert layer.spread == pytest.approx(np.sqrt(apart.sum() / 12), rel=1e-9)
        total += apart
        if layer.module == "head":
            assert layer.error is None
            continue
        shapes = {spec.name: spec.shape for spec in SCHEMA.tensors}
        b, a = (
            padded([value(each, f"{layer.module}.{side}") for each in updates], shapes[f"{layer.module}.{side}"])
            for side in "BA"
        )
        products = sum(p * 0.5 * left @ right for p, left, right in zip(shares, b, a, strict=True))
        factors = 0.5 * np.tensordot(shares, np.stack(b), axes=1) @ np.tensordot(shares, np.stack(a), axes=1)
        assert layer.error == pytest.approx(np.linalg.norm(products - factors), rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(found.distances, np.sqrt(total), atol=1e-9)
    if len(set(ranks)) == 1:
        np.testing.assert_allclose(found.distances**2, squared_distances(SCHEMA, updates), atol=1e-9)


def test_a_shared_factor_loses_nothing_at_all() -> None:
    one = round_changes(SCHEMA, clients(frozenset({Role.LORA_B})))
    both = round_changes(SCHEMA, clients(LORA))

    assert [each.error for each in one.layers] == [0.0, 0.0]
    assert all((each.error or 0.0) > 0.01 for each in both.layers)


def test_a_factor_that_stays_with_its_client_is_counted_by_what_is_known() -> None:
    """Of FedSA only A is sent: nobody knows the products."""
    known = [
        replace(each, start={name: tensor for name, tensor in each.start.items() if not name.endswith(".B")})
        for each in clients(frozenset({Role.LORA_A}))
    ]

    found = round_changes(SCHEMA, known)

    assert [(each.module, each.error) for each in found.layers] == [("m", None), ("n", None)]
    gap = sum(float(np.sum((known[0].delta[name] - known[1].delta[name]) ** 2)) for name in ("m.A", "n.A"))
    assert found.distances[0, 1] == pytest.approx(np.sqrt(gap), rel=1e-6)


def test_one_client_is_apart_from_nobody() -> None:
    found = round_changes(SCHEMA, clients()[:1])

    assert {each.spread for each in found.layers} == {None}
    assert [each.error for each in found.layers if each.module != "head"] == [0.0, 0.0]


def test_a_factor_change_that_keeps_the_product_changes_no_distance() -> None:
    """(B G^-1, G A) is the same layer: a client that ends there is where it was."""
    ours = clients(LORA)
    gauge = np.array([[2.0, 0.5, 0.0], [0.0, -1.0, 1.0], [0.3, 0.0, 0.5]])

    def turned(update: Update) -> Update:
        delta: dict[str, Array] = {}
        for module in ("m", "n"):
            b, a = value(update, f"{module}.B") @ np.linalg.inv(gauge), gauge @ value(update, f"{module}.A")
            delta |= {f"{module}.B": b - update.start[f"{module}.B"], f"{module}.A": a - update.start[f"{module}.A"]}
        return replace(update, delta=delta)

    found = round_changes(SCHEMA, [ours[0], turned(ours[0]), ours[1]])

    assert found.distances[0, 1] == pytest.approx(0, abs=1e-5)
    assert found.distances[0, 2] == pytest.approx(found.distances[1, 2], rel=1e-9)


def test_inner_products_of_other_ranks() -> None:
    draw = np.random.default_rng(3)
    products = [Product(draw.normal(size=(6, rank)), draw.normal(size=(rank, 5))) for rank in (1, 4, 2)]

    flat = np.stack([each.dense().ravel() for each in products])

    np.testing.assert_allclose(inner_products(products), flat @ flat.T, atol=1e-12)


def test_a_result_has_its_corrections_in_its_products() -> None:
    draw = np.random.default_rng(4)
    whole = SCHEMA.with_base(2)
    result = {spec.name: draw.normal(size=spec.shape).astype(np.float32) for spec in whole.tensors}

    found = result_products(SCHEMA, result)

    for module in ("m", "n"):
        dense = result[f"{module}.B"].astype(float) @ result[f"{module}.A"]
        dense += result[f"{module}.base_B"].astype(float) @ result[f"{module}.base_A"]
        np.testing.assert_allclose(found[module].dense(), 0.5 * dense, rtol=1e-6)
