"""Scale and shift passes fedloom's battery, and its merged weights are those of the formula."""

import numpy as np
from fedloom_scale_shift import ScaleShift, plain

from fedloom.client.models.adapter_model import AdapterModel
from fedloom.conformance.adapters import AdapterConformance
from fedloom.core.registry import entries


class TestScaleShift(AdapterConformance):
    """fedloom's battery, and the paper's re-parametrisation."""

    def adapter(self) -> ScaleShift:
        """The kind under test."""
        return ScaleShift(targets=("query", "dense"))

    def test_the_merged_weight_is_that_of_the_paper(self, trained: AdapterModel) -> None:
        """W' = (1 + scale) W and b' = (1 + scale) b + shift, row by row (equation 5)."""
        name = "bert.encoder.layer.0.attention.self.query"
        layer = plain(trained.model.get_base_model().get_submodule(f"{name}.inner"))
        weight, bias = (each.detach().numpy().copy() for each in (layer.weight, layer.bias))
        values = trained.read(trained.schema)

        trained.adapter.merge(trained.model)

        scale, shift = 1 + values[f"{name}.scale"], values[f"{name}.shift"]
        np.testing.assert_allclose(layer.weight.detach().numpy(), scale[:, None] * weight, rtol=1e-6)
        np.testing.assert_allclose(layer.bias.detach().numpy(), scale * bias + shift, rtol=1e-5, atol=1e-6)


def test_it_is_found_by_name() -> None:
    """Its package is installed."""
    assert entries("adapters")["scale-shift"].distribution == "fedloom-scale-shift"
