"""SaRA: the entries that move are the smallest, and their gradients are those of the dense weight."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedloom.client.adapters.wrapping import plain
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, sparse_product
from fedloom.core.config.run import AdapterSection, ModelSection
from tests.conftest import make_model

LAYER = "bert.encoder.layer.0.attention.self.query"


def test_the_smallest_entries_move_and_no_others(model_section: ModelSection) -> None:
    section = AdapterSection.model_validate({"kind": "sparse", "share": 0.25})
    model = make_model(model_section, section)
    weight = plain(model.model.get_base_model().get_submodule(LAYER).inner).weight
    before = weight.detach().numpy().copy()
    values = model.read(model.schema)[f"{LAYER}.entries"]

    model.adapter.merge(model.model)

    moved = weight.detach().numpy() - before
    smallest = np.abs(before) <= np.sort(np.abs(before), axis=None)[255]
    assert np.array_equal(moved != 0, smallest)
    np.testing.assert_allclose(moved[smallest], values, atol=1e-6)


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


def test_entries_of_equal_size_are_taken_in_order(model_section: ModelSection) -> None:
    """So that every process takes the same ones."""
    section = AdapterSection.model_validate({"kind": "sparse", "share": 0.01})
    model = make_model(model_section, section)
    layer = model.model.get_base_model().get_submodule(LAYER)
    with torch.no_grad():
        plain(layer.inner).weight.fill_(-0.5)

    again = type(layer)(layer.inner, 0.01)

    assert again.places.tolist() == list(range(10))
