"""What one process computes of a step: the clipped sum, or the mean gradient, of the examples that it is given."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from fedloom.client.data.rows import Indices, Rows
from fedloom.client.data.tokens import Encoded, collate, encode, microbatches, uniform_microbatches
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.auditing.attacks import rehearse
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.probe import probe
from fedloom.client.privacy.dp_sgd.rng import Entropy
from fedloom.client.training.activations import kept_activations
from fedloom.client.training.device import on_device
from fedloom.client.training.losses import loss_of_each
from fedloom.client.training.microbatch import Microbatch, fitting
from fedloom.client.training.one_pass.meeting import OnePass
from fedloom.client.training.one_pass.passes import Sample
from fedloom.core.config.run import Spec
from fedloom.core.privacy.spends import banded

__all__ = ["Gradients", "batch_loss"]


class Gradients:
    """The gradients of private examples on one device. Decides nothing: it draws no sample and no noise."""

    def __init__(self, model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, at_once: int = 1) -> None:
        """Tokenize the examples, and in a private run try the model and the step on made-up ones.

        Args:
            model: Holds the base model and the adapter.
            rows: The examples to train on, at least one.
            spec: The run, already checked against `policy`.
            policy: The site's policy.
            at_once: Trainers of this process that train at the same time and share its memory.

        Raises:
            DataError: See `encode`.
            ModelError: The run is private and one example could move this model's clipped sum by more than the
                noise covers, see `probe`; or an attack on the private step succeeds, see `rehearse`; or one example
                does not fit into memory.
        """
        self.spec, self.policy = spec, policy
        self.use(model)
        # What a private run's settings make of a row must not end the run: that would tell that there is such a row.
        strict = not spec.privacy.enabled
        encoded = encode(rows, model.tokenizer, spec.model.max_length, strict=strict)
        self.encoded: Encoded = model.prepared(encoded)
        if spec.privacy.enabled:
            self.check_sensitivity()
            privacy = spec.privacy
            assert privacy.noise_multiplier is not None  # checked when the spec met the policy
            automatic = privacy.clipping == "automatic"
            rehearse(privacy.noise_multiplier, privacy.clip_norm, banded(spec), automatic, model.device)
        size = fitting(model, self._batch_loss, spec, policy.compute.memory_mib, at_once)
        self.microbatch = Microbatch(size, model.device)

    def use(self, model: AdapterModel, one_pass: OnePass | None = None) -> None:
        """Train on this model from now on: the one that it was made with, or a twin of it.

        Args:
            model: The model.
            one_pass: Where gradients are computed together with those of other clients. None computes them here.
        """
        self.model, self._one_pass = model, one_pass
        # A pass of several clients computes the frozen blocks, so that nothing of them is looked for.
        alone = one_pass is None
        self._activations = kept_activations(model, self.spec.model.digest, self.policy.compute) if alone else None

    def check_sensitivity(self) -> None:
        """Probe the model and the loss as a private run does at its start.

        Raises:
            ModelError: See `probe`.
        """
        probe(self.model, self._batch_loss, self.spec.model.max_length)

    @contextmanager
    def clipping(
        self, names: Collection[str], base: torch.optim.Optimizer, entropy: Entropy
    ) -> Iterator[PrivateOptimizer]:
        """A private optimizer of these tensors alone: the norm that is clipped, and the noise, are theirs.

        Args:
            names: What moves.
            base: Takes the steps that are released.
            entropy: Of the noise.
        """
        privacy, declared = self.spec.privacy, self.policy.data.declared_examples
        # Both were checked at construction and when the spec met the policy.
        assert privacy.noise_multiplier is not None
        assert declared is not None
        parameters = self.model.trainable(names)
        with recording(self.model.model, parameters) as tape:
            optimizer = PrivateOptimizer(
                base,
                tape,
                entropy,
                noise_multiplier=privacy.noise_multiplier,
                clip_norm=privacy.clip_norm,
                expected_batch=self.spec.train.sampling_rate * declared,
                strategy=banded(self.spec),
                automatic=privacy.clipping == "automatic",
            )
            optimizer.masks = self.model.rank_masks(parameters)
            yield optimizer

    def accumulate(self, optimizer: PrivateOptimizer, sample: Indices) -> None:
        """The clipped sum of these examples, of which there may be none, is the step's so far."""
        if self._one_pass is not None:
            self._one_pass.compute(self._shared(sample, optimizer, [], 0))
            return
        self.microbatch.attempt(len(sample), partial(self._sum, optimizer, sample))

    def _sum(self, optimizer: PrivateOptimizer, sample: Indices, size: int) -> None:
        """The clipped sum of one step, from nothing: what an attempt that failed has added is gone."""
        optimizer.restart()
        for part in uniform_microbatches(sample, self.encoded, size, self.spec.model.max_length):
            optimizer.tape.begin(len(part.rows), self.encoded.sequences)
            torch.autograd.backward(self._loss(part.rows, part.length))
            optimizer.accumulate(part.real)

    def differentiate(self, parameters: list[nn.Parameter], sample: Indices, count: int) -> None:
        """Set the gradients of these parameters to those of the sum of the examples' losses over `count`."""
        if self._one_pass is not None:
            self._one_pass.compute(self._shared(sample, None, parameters, count))
            return
        self.microbatch.attempt(len(sample), partial(self._mean, parameters, sample, count))

    def _shared(
        self, indices: Indices, optimizer: PrivateOptimizer | None, parameters: list[nn.Parameter], count: int
    ) -> Sample:
        return Sample(
            client=self.policy.client.name,
            model=self.model,
            encoded=self.encoded,
            indices=indices,
            microbatch=self.microbatch,
            longest=self.spec.model.max_length,
            optimizer=optimizer,
            parameters=parameters,
            count=count,
        )

    def _mean(self, parameters: list[nn.Parameter], sample: Indices, count: int, size: int) -> None:
        """The gradient of a sample's share in its mean loss, from nothing."""
        for parameter in parameters:
            parameter.grad = None
        for part in microbatches(sample, self.encoded, size):
            torch.autograd.backward(self._loss(part) / count)

    def _loss(self, indices: Indices, length: int | None = None) -> torch.Tensor:
        batch = collate(self.encoded, indices, self.model.tokenizer.pad_token_id, length)
        if self._activations is None:
            return self._batch_loss(batch)
        with self._activations.skipping(self.encoded, indices, batch):
            return self._batch_loss(batch)

    def _batch_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch_loss(self.model, batch)


def batch_loss(model: AdapterModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of per-example losses; no term of one example depends on another."""
    return loss_of_each(model.task, model.logits(batch), on_device(batch["labels"], model.device)).sum()
