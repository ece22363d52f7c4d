"""Opacus's DPOptimizer with noise from our entropy and one flat clip over all trained parameters."""

from collections.abc import Sequence
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import nn

from fedloom.client.privacy.entropy import Entropy
from fedloom.client.privacy.per_example import Tape

__all__ = ["PrivateOptimizer"]


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus ships no types
    """One step = any number of `accumulate` calls, then exactly one `release`.

    Guarantee: what `release` writes into the parameters is a function of sum + N(0, (sigma·C)²·I), where the
    sum changes by at most C in L2 norm when one example is added to or removed from the logical batch.

    Precondition: the tape's gradients come from a loss that is a sum of per-example losses.

    Norms, sum and noise are float32 whatever the parameters' type. The memory of a step is that of its largest
    microbatch and one vector of all trained parameters, however many microbatches it has.
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
    ) -> None:
        """`expected_batch` divides the noisy sum; it must be public (rate times the declared number of examples)."""
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
        self._total = torch.zeros(tape.width, device=tape.parameters[0].device)

    def restart(self) -> None:
        """Forget what the step under way has accumulated, so that its microbatches can be added anew."""
        self._total.zero_()

    def accumulate(self) -> None:
        """Clip the tape's examples, add them to the step's sum and clear the tape. No examples add nothing."""
        self.tape.finish()
        self.clip_and_accumulate()
        self.tape.clear()

    def clip_and_accumulate(self) -> None:
        """Scale each example's whole gradient to norm at most C; a non-finite one counts as zero.

        A run that failed on a non-finite gradient would tell that such an example is there.
        """
        norms = self.tape.norms()
        finite = torch.isfinite(norms)
        if not bool(finite.all()):
            self.tape.drop(~finite)
            norms = torch.where(finite, norms, torch.zeros_like(norms))
        factors = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        self.tape.add_weighted_sum(factors, self._total)
        for parameter in self.tape.parameters:
            parameter.summed_grad = self._part(self._total, parameter)  # type: ignore[attr-defined]  # Opacus's interface

    def _part(self, flat: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """One parameter's share of a vector over all of them."""
        return flat[self.tape.columns[parameter]].view_as(parameter)

    def add_noise(self) -> None:
        """One draw of the Gaussian mechanism over all parameters."""
        drawn = torch.from_numpy(self.entropy.normal(self.tape.width)).to(self._total.device, torch.float32)
        noisy = torch.add(self._total, drawn, alpha=self.noise_multiplier * self.max_grad_norm)
        for parameter in self.tape.parameters:
            grad = self._part(noisy, parameter)
            grad = grad * self.masks[parameter] if parameter in self.masks else grad
            parameter.grad = grad.to(parameter.dtype)

    def scale_grad(self) -> None:
        """Divide by the public expected batch size."""
        for parameter in self.tape.parameters:
            assert parameter.grad is not None  # add_noise has just set it
            parameter.grad /= self.expected_batch_size

    def release(self, pull: Sequence[torch.Tensor] = ()) -> None:
        """Add the noise and take the optimiser's step, whether or not any example was sampled.

        Args:
            pull: Gradient terms that do not depend on the data (FedProx), one per parameter, or none.
        """
        self.add_noise()
        self.scale_grad()
        for parameter, term in zip(self.tape.parameters, pull, strict=False):
            assert parameter.grad is not None  # add_noise has just set it
            parameter.grad += term
        self.original_optimizer.step()
        self._total.zero_()

    def step(self, closure: Any = None) -> None:
        """Refused: a step that clips and noises in one call is easy to call once per microbatch."""
        raise NotImplementedError("call accumulate() per microbatch and release() once per step")
