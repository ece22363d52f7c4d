"""Intruder dimensions where the singular vectors are known."""

import numpy as np
import pytest

from fedloom.core.errors import SchemaError
from fedloom.strategies.diagnostics.intruders import intruder_dimensions
from fedloom.strategies.merging.adapter import Product


def directions(*sizes: tuple[int, float]) -> Product:
    """A change that writes these sizes to these outputs, each from an input of its own."""
    b, a = np.zeros((8, len(sizes))), np.zeros((len(sizes), 6))
    for index, (output, size) in enumerate(sizes):
        b[output, index], a[index, index] = size, 1.0
    return Product(b, a)


WEIGHT = np.zeros((8, 6))
WEIGHT[:6, :6] = np.diag([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
"""Writes to the first six of eight outputs: its left singular vectors are the unit vectors there."""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (directions((0, 0.0)), 0),
        (directions((0, 9.0), (1, 9.0)), 0),  # stronger, and the directions that were there
        (directions((6, 50.0)), 1),  # a new output
        (directions((6, 50.0), (7, 40.0)), 2),
        (directions((6, 0.5)), 0),  # new, and beneath the leading ones
    ],
)
def test_directions_that_the_weight_did_not_have_are_counted(change: Product, expected: int) -> None:
    assert intruder_dimensions(WEIGHT, change, leading=3) == expected


def test_only_the_leading_directions_and_only_the_unlike_ones_count() -> None:
    new = directions((6, 50.0), (7, 40.0))
    assert intruder_dimensions(WEIGHT, new, leading=1) == 1
    # Halfway between an old output and a new one: its cosine with the old one is 0.6.
    tilted = Product(np.array([[30.0, 0, 0, 0, 0, 0, 40.0, 0]]).T, np.eye(6)[5:])
    assert intruder_dimensions(WEIGHT, tilted, leading=1, similar=0.5) == 0
    assert intruder_dimensions(WEIGHT, tilted, leading=1, similar=0.7) == 1


def test_it_is_the_definition_on_random_weights() -> None:
    draw = np.random.default_rng(2)
    weight = draw.normal(size=(40, 30))
    change = Product(6 * draw.normal(size=(40, 4)), draw.normal(size=(4, 30)))

    before, after = (np.linalg.svd(each)[0] for each in (weight, weight + change.dense()))
    expected = sum(max(abs(float(after[:, j] @ before[:, i])) for i in range(30)) < 0.5 for j in range(10))

    assert 0 < expected < 10
    assert intruder_dimensions(weight, change) == expected


def test_another_base_model_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"\(8, 6\) and a change of \(8, 5\)"):
        intruder_dimensions(WEIGHT, Product(np.ones((8, 1)), np.ones((1, 5))))
