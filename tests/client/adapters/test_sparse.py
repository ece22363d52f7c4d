"""SaRA, LIFT and DSEE: which entries move, that everybody moves the same ones, and their gradients."""

import hashlib
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedloom.client.adapters.sparse.entries import ENTRIES
from fedloom.client.adapters.sparse.masks import principal, residual, smallest
from fedloom.client.adapters.wrapping import plain
from fedloom.client.models.load import load_model
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, sparse_product
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ModelError
from tests.conftest import make_model

LAYER = "bert.encoder.layer.0.attention.self.query"


def before_and_after(section: ModelSection, **options: object) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """A weight as it was and as it is merged, and the trained values of its layer by role."""
    model = make_model(section, AdapterSection.model_validate(options))
    weight = plain(model.model.get_base_model().get_submodule(LAYER).inner).weight
    before = weight.detach().numpy().copy()
    values = model.read(model.schema)
    own = {spec.role: values[spec.name] for spec in model.schema.tensors if spec.module == LAYER}
    model.adapter.merge(model.model)
    return before, weight.detach().numpy(), own


def largest(sizes: np.ndarray, count: int) -> np.ndarray:
    chosen: np.ndarray = sizes >= np.sort(sizes, axis=None)[-count]
    return chosen


def best(weight: np.ndarray, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(weight.astype(np.float64))
    part: np.ndarray = (left[:, :rank] * values[:rank]) @ right[:rank]
    return part


def test_the_smallest_entries_move_and_no_others(model_section: ModelSection) -> None:
    before, after, values = before_and_after(model_section, kind="sparse", share=0.25)

    moved = after - before
    smallest = np.abs(before) <= np.sort(np.abs(before), axis=None)[255]
    assert np.array_equal(moved != 0, smallest)
    np.testing.assert_allclose(moved[smallest], values[ENTRIES], atol=1e-6)


def test_lift_moves_the_largest_entries_of_the_best_approximation(model_section: ModelSection) -> None:
    """Which are others than the weight's own largest."""
    before, after, values = before_and_after(model_section, kind="sparse", share=0.05, mask="principal", rank=4)

    chosen = largest(np.abs(best(before, 4)), 51)
    assert np.array_equal(after != before, chosen)
    np.testing.assert_allclose((after - before)[chosen], values[ENTRIES], atol=1e-6)
    assert not np.array_equal(chosen, largest(np.abs(before), 51))


def test_dsee_adds_a_pair_and_the_entries_that_a_low_rank_matrix_fits_worst(model_section: ModelSection) -> None:
    before, after, values = before_and_after(model_section, kind="dsee", rank=3, alpha=6, entries=20)

    sparse = np.zeros((32, 32))
    for _ in range(3):
        rest = before - best(before - sparse, 3)
        chosen = largest(np.abs(rest), 20)
        sparse = np.where(chosen, rest, 0)
    expected = before + 2.0 * values["dsee_U"] @ values["dsee_V"]
    expected[chosen] += values[ENTRIES]
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-5)


def test_the_support_is_found_in_a_low_rank_matrix_with_a_few_entries_added() -> None:
    draw = np.random.default_rng(0)
    weight = draw.normal(size=(40, 3)) @ draw.normal(size=(3, 30)) + 0.01 * draw.normal(size=(40, 30))
    places = np.sort(draw.choice(1200, 25, replace=False))
    weight.reshape(-1)[places] += 3 * draw.choice([-1, 1], 25)

    assert residual(torch.from_numpy(weight.astype(np.float32)), 25, 3).tolist() == places.tolist()


@pytest.mark.parametrize("mask", [smallest, partial(principal, rank=5), partial(residual, rank=5)])
def test_a_mask_does_not_depend_on_how_it_is_computed(mask: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    """Another memory layout takes LAPACK another way, and signs of singular vectors with it."""
    draw = np.random.default_rng(1)
    weight = torch.from_numpy(draw.normal(size=(24, 16)).astype(np.float32))

    places = mask(weight, 40)

    assert torch.equal(mask(weight.t().contiguous().t(), 40), places)
    upside_down = torch.zeros(24 * 16).index_fill(0, mask(-weight.flip(0), 40), 1).view(24, 16).flip(0)
    assert upside_down.flatten().nonzero().flatten().tolist() == places.tolist()


def test_parties_with_other_masks_have_other_schemas(model_section: ModelSection) -> None:
    """So that a client whose mask is another is refused when it joins; shapes alone would not tell."""
    schemas = [
        load_model(model_section, AdapterSection.model_validate({"kind": "sparse", "rank": 4, **options})).schema
        for options in ({}, {"mask": "principal"}, {"mask": "principal", "rank": 5}, {})
    ]

    assert len({schema.digest for schema in schemas}) == 3
    assert schemas[0].digest == schemas[3].digest
    assert len({tuple(spec.shape for spec in schema.tensors) for schema in schemas}) == 1
    (places,) = {spec.name for spec in schemas[0].tensors if spec.module == LAYER}
    model = load_model(model_section, AdapterSection(kind="sparse"))
    found = model.model.get_base_model().get_submodule(LAYER).places.numpy().astype("<i8")
    assert places == f"{LAYER}.entries.{hashlib.sha256(found.tobytes()).hexdigest()[:8]}"


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 7), (2, 3, 2, 7)])
def test_gradients_of_entries_are_those_of_the_dense_weight(shape: tuple[int, ...]) -> None:
    """Each example's alone, gathered, and the input's too."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw, requires_grad=True)
    places = torch.tensor([0, 6, 9, 34, 20])
    entries = torch.nn.Parameter(torch.randn(5, generator=draw))
    tape = Tape([entries])

    tape.begin(len(x))
    torch.autograd.backward(sparse_product(x, entries, places, 5, tape).pow(3).sum())

    dense = torch.zeros(35)
    dense[places] = entries.detach()
    dense = dense.view(5, 7).requires_grad_()
    rows = []
    for each in x.detach():
        (found,) = torch.autograd.grad(F.linear(each[None], dense).pow(3).sum(), dense)
        rows.append(found.flatten()[places])
    torch.testing.assert_close(tape.gradient(entries), torch.stack(rows), rtol=1e-4, atol=1e-5)
    again = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(F.linear(again, dense.detach()).pow(3).sum(), again)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


def test_entries_of_equal_size_are_taken_in_order() -> None:
    """So that every process takes the same ones."""
    equal = torch.full((8, 6), -0.5)

    assert smallest(equal, 10).tolist() == principal(equal, 10, 1).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kind": "sparse", "mask": "principal", "rank": 33}, r"query: adapter\.rank = 33 is above its 32 singular"),
        ({"kind": "dsee", "rank": 33}, r"query: adapter\.rank = 33 is above its 32 singular"),
        ({"kind": "dsee", "entries": 1025}, r"query: adapter\.entries = 1025 is above its 1024 entries; lower it"),
    ],
)
def test_what_a_layer_does_not_have_is_refused(model_section: ModelSection, options: object, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        load_model(model_section, AdapterSection.model_validate(options))
