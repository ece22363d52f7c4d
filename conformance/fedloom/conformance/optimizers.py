"""What every local optimiser must do.

::

    from fedloom.conformance.optimizers import OptimizerConformance

    class TestMine(OptimizerConformance):
        def optimizer(self):
            return Mine(momentum=0.9)
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedloom.client.optimizers.api import Optimizer
from fedloom.core.config.parsing import Section

__all__ = ["OptimizerConformance"]

_SHAPES = ((3, 4), (5,))
_STEPS = 6

Gradient = Callable[[int, list[nn.Parameter]], list[torch.Tensor]]
"""The gradients of a step, by its number."""


class OptimizerConformance:
    """The battery. Define `optimizer`."""

    def optimizer(self) -> Optimizer:
        """A fresh instance of the optimiser under test."""
        raise NotImplementedError("define optimizer() in the subclass and return the optimiser under test")

    def test_its_options_are_a_described_model(self) -> None:
        """The run file's keys, the JSON Schema and the reference come from it."""
        optimizer = self.optimizer()

        assert isinstance(optimizer, Section), "derive it from fedloom.core.config.parsing.Section"
        assert (type(optimizer).__doc__ or "").strip(), "the first line of its docstring is the summary"
        assert type(optimizer).model_validate_json(optimizer.model_dump_json()) == optimizer
        for key, spec in type(optimizer).model_json_schema().get("properties", {}).items():
            assert spec.get("description"), f"say below {key} what it means"

    def test_it_trains(self) -> None:
        """It lowers a quadratic, with each group at its own rate; one at next to no rate stays."""
        parameters = _parameters(1)
        before = [each.detach().clone() for each in parameters]
        groups = [{"params": [parameters[0]], "lr": 0.01}, {"params": [parameters[1]], "lr": 1e-9}]

        self.run(parameters, lambda _, now: [2 * each.detach() for each in now], groups)

        moved = [float((each.detach() - at).norm()) for each, at in zip(parameters, before, strict=True)]
        assert float(parameters[0].detach().norm()) < float(before[0].norm())
        assert moved[1] < 1e-3 * moved[0]

    def test_its_state_is_a_function_of_the_gradients(self) -> None:
        """So that it is post-processing of what was noised: other values and other noise elsewhere do not reach it."""
        states = []
        for stream, seed in ((1, 10), (2, 20)):
            parameters = _parameters(stream)
            torch.manual_seed(seed)
            states.append(self.run(parameters, _drawn))

        assert len(states[0]) == len(states[1])
        assert all(torch.equal(one, two) for one, two in zip(*states, strict=True))

    def test_it_is_deterministic(self) -> None:
        """Equal gradients give equal values, whatever was drawn before, and nothing is drawn."""
        ends = []
        for seed in (1, 2):
            parameters = _parameters(1)
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            self.run(parameters, _drawn)
            assert torch.equal(torch.get_rng_state(), before), "it draws random numbers"
            ends.append([each.detach().clone() for each in parameters])

        assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))

    def test_a_step_on_zeros_is_finite(self) -> None:
        """A step without any example and without noise; with what noise an optimiser may have corrected for."""
        for noise_std in (0.0, 0.5):
            parameters = _parameters(1)

            state = self.run(parameters, lambda _, now: [torch.zeros_like(each) for each in now], noise_std=noise_std)

            assert all(bool(torch.isfinite(each).all()) for each in [*parameters, *state])

    def test_the_longest_move_bounds_every_round(self) -> None:
        """Whatever gradients of a norm come, with FedProx's pull: a longer update is refused as dishonest."""

        @settings(max_examples=100, deadline=None)
        @given(
            steps=st.integers(1, 12),
            rate=st.floats(1e-3, 3),
            gradient=st.floats(1e-3, 100),
            pull=st.sampled_from([0.0, 0.1, 1.0, 3.0]),
            kind=st.sampled_from(["same", "turning", "drawn", "one value", "shrinking"]),
            noise=st.sampled_from([0.0, 0.5, 2.0]),
        )
        def bounded(steps: int, rate: float, gradient: float, pull: float, kind: str, noise: float) -> None:
            moved, size = self.moved(steps, rate, gradient, pull, kind, noise)
            most = self.optimizer().longest_move(steps, rate, gradient, size, pull)
            # Rounding of the values themselves, in float32, is no move.
            assert moved <= most * (1 + 1e-4) + 1e-5

        bounded()

    def test_what_noise_moves_is_known_if_claimed(self) -> None:
        """Each step's noise moves values by what a gradient in that step alone does: the squares of these add up."""
        known = getattr(self.optimizer(), "noise_moved", lambda *_: None)(_STEPS, 0.01, 2.0)
        if known is None:
            pytest.skip("it does not say what noise moves")
        squares = 0.0
        for impulse in range(_STEPS):
            parameters = _parameters(1)
            start = [each.detach().clone() for each in parameters]
            self.run(parameters, lambda step, now, at=impulse: [torch.full_like(each, step == at) for each in now])  # type: ignore[misc]
            squares += float((parameters[0].detach() - start[0]).double().square().mean())

        assert known == pytest.approx(2.0 * squares**0.5, rel=1e-4)

    def moved(
        self, steps: int, rate: float, gradient: float, pull: float, kind: str, noise: float = 0.0
    ) -> tuple[float, int]:
        """How long the change of all values is after so many steps, as an L2 norm, and how many values there are.

        The optimiser is told of noise whose length is that of the gradient times `noise`.
        """
        parameters = _parameters(1)
        start = [each.detach().clone() for each in parameters]
        size = sum(each.numel() for each in parameters)

        def pulled(step: int, now: list[nn.Parameter]) -> list[torch.Tensor]:
            whole = _direction(kind, step, size)
            parts = torch.split(whole * (gradient / whole.norm()), [each.numel() for each in now])
            shaped = [part.view_as(each) for part, each in zip(parts, now, strict=True)]
            return [part + pull * (each.detach() - at) for part, each, at in zip(shaped, now, start, strict=True)]

        groups = [{"params": parameters, "lr": rate}]
        self.run(parameters, pulled, groups, steps, noise_std=noise * gradient / size**0.5)
        change = torch.cat([(each.detach() - at).flatten() for each, at in zip(parameters, start, strict=True)])
        return float(change.double().norm()), size

    def run(
        self,
        parameters: list[nn.Parameter],
        gradients: Gradient,
        groups: list[dict[str, Any]] | None = None,
        steps: int = _STEPS,
        noise_std: float = 0.0,
    ) -> list[torch.Tensor]:
        """Take so many steps from fresh state; returns the tensors of the state, in order."""
        made = self.optimizer().make(groups or [{"params": parameters, "lr": 0.01}], noise_std)
        assert not made.state, "a round begins with fresh state"
        for step in range(steps):
            for parameter, gradient in zip(parameters, gradients(step, parameters), strict=True):
                parameter.grad = gradient
            made.step()
        return [value for each in parameters for value in made.state[each].values() if isinstance(value, torch.Tensor)]


def _parameters(stream: int) -> list[nn.Parameter]:
    draw = np.random.default_rng([11, stream])
    return [nn.Parameter(torch.from_numpy(draw.normal(0, 1, shape).astype(np.float32))) for shape in _SHAPES]


def _drawn(step: int, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    draw = np.random.default_rng([13, step])
    return [torch.from_numpy(draw.normal(0, 1, tuple(each.shape)).astype(np.float32)) for each in parameters]


def _direction(kind: str, step: int, size: int) -> torch.Tensor:
    """A gradient's direction, not zero."""
    match kind:
        case "turning":
            return torch.ones(size) * float((-1) ** step)
        case "drawn":
            return torch.from_numpy(np.random.default_rng([17, step]).normal(0, 1, size).astype(np.float32))
        case "one value":
            return torch.eye(size)[step % size]
        case "shrinking":
            return torch.linspace(1, 1e-3, size)
    return torch.ones(size)
