"""Bottleneck adapters and Compacter against dense matrices in numpy, and where they sit in models of each family."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedloom.client.adapters.wrapping import wrappers
from fedloom.client.models.load import load_model
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ModelError, SchemaError
from fedloom.core.schema import Array
from fedloom.strategies.fedpeft import FedPEFT
from fedloom.strategies.start import starting_adapter
from tests.conftest import make_model

LAYER = "bert.encoder.layer.1.output.dense"
ENDS = {
    "bert": {f"bert.encoder.layer.{n}.{end}.dense" for n in (0, 1) for end in ("attention.output", "output")},
    "gpt2": {f"transformer.h.{n}.{end}.c_proj" for n in (0, 1) for end in ("attn", "mlp")},
    "llama": {f"model.layers.{n}.{end}" for n in (0, 1) for end in ("self_attn.o_proj", "mlp.down_proj")},
}


def options(kind: str, **values: object) -> AdapterSection:
    return AdapterSection.model_validate({"kind": kind, "size": 8, **values})


def gelu(x: Array) -> Array:
    return nn.functional.gelu(torch.from_numpy(x)).numpy()


def network(section: ModelSection, adapter: AdapterSection) -> tuple[nn.Module, dict[str, Array], Array, Array]:
    """The wrapper of one layer, the trained values of its run, an input, and what the layer itself gives for it."""
    model = make_model(section, adapter)
    wrapper = dict(wrappers(model.model))[LAYER]
    x = np.random.default_rng(2).normal(size=(3, 5, 64)).astype(np.float32)
    layer: Any = wrapper.inner
    plain = layer.base_layer
    h = x @ plain.weight.detach().numpy().T + plain.bias.detach().numpy()
    return wrapper, model.read(model.schema), x, h


def given(wrapper: nn.Module, x: Array) -> Array:
    with torch.no_grad():
        found: Array = wrapper(torch.from_numpy(x)).numpy()
    return found


def test_a_bottleneck_adds_up_gelu_down(model_section: ModelSection) -> None:
    wrapper, values, x, h = network(model_section, options("bottleneck"))
    down, d, up, u = (values[f"{LAYER}.adapter_{each}"] for each in ("down", "down_bias", "up", "up_bias"))

    np.testing.assert_allclose(given(wrapper, x), h + gelu(h @ down.T + d) @ up.T + u, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("products", [1, 2, 4])
def test_the_matrices_of_compacter_are_sums_of_kronecker_products(model_section: ModelSection, products: int) -> None:
    """Equation 6 of the paper, by numpy.kron."""
    wrapper, values, x, h = network(model_section, options("compacter", products=products))
    shared = [values[f"compacter.kronecker_{index}"] for index in range(products)]

    def dense(side: str) -> Array:
        left, right = (values[f"{LAYER}.{side}_{each}"] for each in ("left", "right"))
        found: Array = np.sum([np.kron(a, np.outer(left[:, i], right[i])) for i, a in enumerate(shared)], axis=0)
        return found

    low = gelu(h @ dense("down").T + values[f"{LAYER}.down_bias"])
    assert dense("down").shape == (8, 32)
    expected = h + low @ dense("up").T + values[f"{LAYER}.up_bias"]
    np.testing.assert_allclose(given(wrapper, x), expected, rtol=1e-4, atol=1e-5)


def test_what_layers_share_is_one_tensor_with_one_gradient_of_each_example(model_section: ModelSection) -> None:
    """The sum over the layers, which is clipped as one: a layer at a time is not what an example adds to a step."""
    model = make_model(model_section, options("compacter", products=2))
    modules = dict(wrappers(model.model))
    assert len(modules) == 4
    names = [name for name in model.schema.names("kronecker")]
    assert sorted(names) == ["compacter.kronecker_0", "compacter.kronecker_1"]
    ids, mask = torch.randint(5, 90, (3, 7)), torch.ones(3, 7, dtype=torch.long)

    def losses(chosen: slice) -> torch.Tensor:
        logits = model.model(input_ids=ids[chosen], attention_mask=mask[chosen]).logits
        return nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1])[chosen], reduction="sum")

    parameters = model.trainable(model.schema.roles)
    rule = model.slots["compacter.kronecker_0"].parameter
    alone = [torch.autograd.grad(losses(slice(row, row + 1)), rule)[0] for row in range(3)]
    with recording(model.model, parameters) as tape:
        tape.begin(3)
        torch.autograd.backward(losses(slice(None)))
        tape.finish()
        torch.testing.assert_close(tape.gradient(rule), torch.stack(alone), rtol=1e-3, atol=1e-5)
        whole = torch.linalg.vector_norm(tape.flat, dim=1)
        torch.testing.assert_close(tape.norms(), whole, rtol=1e-3, atol=1e-6)
    assert tape.width == model.schema.size

    copied = {id(module.kronecker_0) for module in modules.values()}
    assert copied == {id(rule)}


@pytest.mark.parametrize("architecture", ENDS)
@pytest.mark.parametrize("kind", ["bottleneck", "compacter"])
def test_it_sits_behind_attention_and_feed_forward_blocks(
    small_bases: dict[str, Path], kind: str, architecture: str
) -> None:
    section = ModelSection(base=str(small_bases[architecture]), labels=("no", "yes"), max_length=16)

    model = load_model(section, options(kind))

    assert {name for name, _ in wrappers(model.model)} == ENDS[architecture]


def test_one_names_layers_by_the_end_of_their_names(model_section: ModelSection) -> None:
    model = load_model(model_section, options("bottleneck", after=["1.output.dense", "key"]))

    found = [name for name, _ in wrappers(model.model)]
    assert found == [*(f"bert.encoder.layer.{n}.attention.self.key" for n in (0, 1)), LAYER]


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (options("bottleneck", after=["nput.dense"]), r"adapter\.after nput\.dense: .* layers end in .*output\.dense"),
        (options("bottleneck", after=["classifier"]), r"adapter\.after classifier: "),
        (options("compacter", products=3), r"adapter\.size = 8 is no multiple of adapter\.products = 3"),
        (options("compacter", size=14, products=7), r"32 outputs are no multiple of adapter\.products = 7"),
    ],
)
def test_what_cannot_be_is_refused(model_section: ModelSection, adapter: AdapterSection, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(model_section, adapter)


def test_its_size_is_what_the_page_says(model_section: ModelSection) -> None:
    """2 m + 1 for each output and m; n³, and 2 (out + m) and biases; in four layers of 32 outputs."""
    bottleneck, compacter = (load_model(model_section, options(kind)).schema for kind in ("bottleneck", "compacter"))

    head = bottleneck.select({"head"}).size
    assert bottleneck.size - head == 4 * (32 * (2 * 8 + 1) + 8)
    assert compacter.size - head == 4**3 + 4 * (2 * (32 + 8) + 32 + 8)


def test_fedpeft_trains_it_as_the_papers_prototype(model_section: ModelSection) -> None:
    schema, other = (
        load_model(model_section, AdapterSection(kind=kind)).schema for kind in ("bottleneck", "compacter")
    )
    strategy = FedPEFT(kind="adapter")
    state = strategy.init(schema, starting_adapter(schema, 0), 0)

    assert schema.names(*strategy.plan(state, 0, "a").train) == schema.names()
    with pytest.raises(SchemaError, match="this strategy trains adapter_down"):
        strategy.init(other, starting_adapter(other, 0), 0)
