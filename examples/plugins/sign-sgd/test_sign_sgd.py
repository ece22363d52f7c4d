"""Sign-SGD passes fedloom's battery, and its steps are those of the formula."""

import numpy as np
import torch
from fedloom_sign_sgd import SignSGD

from fedloom.conformance.optimizers import OptimizerConformance
from fedloom.core.registry import entries


class TestSignSGD(OptimizerConformance):
    """fedloom's battery, and the paper's formula."""

    def optimizer(self) -> SignSGD:
        """The optimiser under test."""
        return SignSGD(momentum=0.5)

    def test_steps_are_those_of_the_formula(self) -> None:
        """Algorithm 1 of the paper in numpy."""
        gradients = np.random.default_rng(0).normal(0, 1, (5, 7)).astype(np.float32)
        value, mean = np.zeros(7, np.float32), np.zeros(7, np.float32)
        for gradient in gradients:
            mean = np.float32(0.5) * mean + np.float32(0.5) * gradient
            value = value - np.float32(0.01) * np.sign(mean)

        parameter = torch.nn.Parameter(torch.zeros(7))
        self.run([parameter], lambda step, _: [torch.from_numpy(gradients[step])], steps=5)

        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-5)


def test_it_is_found_by_name() -> None:
    """Its package is installed."""
    assert entries("optimizers")["sign-sgd"].distribution == "fedloom-sign-sgd"
