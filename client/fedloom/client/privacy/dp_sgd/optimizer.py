"""Opacus's DPOptimizer on whole numbers: one flat clip over all trained parameters, an exact sum, exact noise."""

from collections.abc import Sequence
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import nn

from fedloom.client.privacy.dp_sgd.correlated import Correlated
from fedloom.client.privacy.dp_sgd.grad_sample import Tape
from fedloom.client.privacy.dp_sgd.noise import noise
from fedloom.client.privacy.dp_sgd.rng import Entropy
from fedloom.core.errors import ConfigError
from fedloom.core.privacy.banded import Banded
from fedloom.core.privacy.gaussian import LEAST_CLIP_NORM, deviation, longest

__all__ = ["PrivateOptimizer"]

_GAMMA = 0.01
"""Added to a gradient's norm by automatic clipping; the paper's value."""


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus ships no types
    """One step = any number of `accumulate` calls, then exactly one `release`.

    Guarantee: what `release` writes into the parameters is a function of Z + N(0, s²·I) over the reals, where Z is a
    vector of whole numbers that changes by at most `UNITS` in L2 norm when one example is added to or removed from the
    logical batch, and s is at least sigma·`UNITS`. See `fedloom.core.privacy.gaussian`; docs/privacy.md has the proof.

    With noise bands it is a function of C Z + N(0, s²·I) over the Z of all steps so far, and an example that is sampled
    once moves C Z by at most `UNITS`, within as many steps as there are bands.

    Clipping is by a threshold, min(1, C / |g|) of a gradient g, or automatic, C / (|g| + 0.01): Bu, Wang, Zha and
    Karypis, "Automatic clipping", NeurIPS 2023, arXiv 2206.07136, AUTO-S. Neither lets an example add more than C.

    Precondition: the tape's gradients come from a loss that is a sum of per-example losses.

    Clipping and noise know no C: a gradient is brought to steps of the grid before, and the noised sum to units of C
    after, in float32, whatever the parameters' type; by the same factor, so that rounding adds a little noise and no
    bias. The memory of a step is that of its largest microbatch and one vector of all trained parameters, however many
    microbatches it has.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        tape: Tape,
        entropy: Entropy,
        *,
        noise_multiplier: float,
        clip_norm: float,
        expected_batch: float,
        strategy: Banded | None = None,
        automatic: bool = False,
    ) -> None:
        """Begin a round.

        Args:
            optimizer: Takes the steps.
            tape: Where the examples' gradients are.
            entropy: Of the noise.
            noise_multiplier: Noise standard deviation over the clip norm.
            clip_norm: Most that one example may add.
            expected_batch: Divides the noisy sum; it must be public (rate times the declared number of examples).
            strategy: C, whose steps the round must not exceed. None draws the noise of each step for itself.
            automatic: Clip without a threshold.

        Raises:
            ConfigError: The clip norm or the noise multiplier is one that the arithmetic here does not hold.
        """
        if not LEAST_CLIP_NORM <= clip_norm <= 1 / LEAST_CLIP_NORM:
            raise ConfigError(f"clip norm {clip_norm!r}; {LEAST_CLIP_NORM:g} to {1 / LEAST_CLIP_NORM:g} is allowed")
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=expected_batch,
            loss_reduction="mean",
        )
        self.tape = tape
        self.entropy = entropy
        self.masks: dict[nn.Parameter, torch.Tensor] = {}
        """Zero where a parameter is beyond the client's rank: neither gradient nor noise moves it there."""
        self._deviation = deviation(noise_multiplier) if noise_multiplier else 0
        self._longest = longest(tape.width, 1 if strategy is None else strategy.bands)
        self._automatic = automatic
        self._correlated = None if strategy is None else Correlated(strategy)
        self._total = torch.zeros(tape.width, dtype=torch.int64, device=tape.parameters[0].device)

    @property
    def grid_sum(self) -> torch.Tensor:
        """The step's sum so far, shape (P,), int64, in steps of the grid; without noise, and not to leave the machine.

        What other processes have clipped of the step may be added to it, without any error.
        """
        return self._total

    @property
    def clipped_sum(self) -> torch.Tensor:
        """The step's sum so far, without noise, shape (P,), float32. For checks: it must not leave the machine."""
        return self._total.float().mul_(self.max_grad_norm / self._longest)

    def restart(self) -> None:
        """Forget what the step under way has accumulated, so that its microbatches can be added anew."""
        self._total.zero_()

    def accumulate(self, real: int | None = None) -> None:
        """Clip the tape's examples, add them to the step's sum and clear the tape. No examples add nothing.

        Args:
            real: How many of the examples count; those after them fill a microbatch up. None counts all.
        """
        self.tape.finish()
        self.clip_and_accumulate(real)
        self.tape.clear()

    def clip_and_accumulate(self, real: int | None = None) -> None:
        """Add each example's whole gradient, scaled to norm at most C and rounded to the grid, to the sum.

        A non-finite one counts as zero: a run that failed on it would tell that such an example is there. Its scale is
        0 or not a number, and both add nothing. No value is read from the device: a GPU would first have to do all the
        work that it has been given.

        Args:
            real: As for `accumulate`.
        """
        norms = self.tape.norms()
        least = norms + _GAMMA if self._automatic else norms.clamp(min=self.max_grad_norm)
        scales = self._longest / least
        if real is not None:
            scales[real:] = 0.0
        self.tape.add_rounded_sum(scales, self._total)

    def add_noise(self) -> None:
        """One draw of the Gaussian mechanism over all parameters; then back from steps of the grid to gradients."""
        if self._correlated is not None:
            self._correlated.mix(self._total)
        self._add_normal()
        noised = self.clipped_sum
        if self._correlated is not None:
            noised = self._correlated.unmix(noised)
        for parameter in self.tape.parameters:
            grad = noised[self.tape.columns[parameter]].view_as(parameter)
            grad = grad * self.masks[parameter] if parameter in self.masks else grad
            parameter.grad = grad.to(parameter.dtype)

    def _add_normal(self) -> None:
        if self._deviation:
            self._total += self._normal()

    def _normal(self) -> torch.Tensor:
        return noise(self.entropy, self._deviation, self.tape.width, self._total.device)

    def scale_grad(self) -> None:
        """Divide by the public expected batch size."""
        for parameter in self.tape.parameters:
            assert parameter.grad is not None  # add_noise has just set it
            parameter.grad /= self.expected_batch_size

    def release(self, terms: Sequence[torch.Tensor] = ()) -> None:
        """Add the noise and take the optimiser's step, whether or not any example was sampled.

        Args:
            terms: Gradient terms that do not depend on the data, one per parameter, or none: see `GradientTerms`.
        """
        self.add_noise()
        self.scale_grad()
        for parameter, term in zip(self.tape.parameters, terms, strict=False):
            assert parameter.grad is not None  # add_noise has just set it
            parameter.grad += term
        self.original_optimizer.step()
        self._total.zero_()

    def step(self, closure: Any = None) -> None:
        """Refused: a step that clips and noises in one call is easy to call once per microbatch."""
        raise NotImplementedError("call accumulate() per microbatch and release() once per step")
