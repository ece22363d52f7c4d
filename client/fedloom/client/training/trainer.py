"""Local training of one round: Poisson-sampled steps on the adapter, private or not."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedloom.client.data.rows import Indices, Rows
from fedloom.client.data.tokens import Encoded, encode
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.optimizers.api import noise_std, optimizer_of
from fedloom.client.policy import Policy
from fedloom.client.privacy.dp_sgd.rng import Entropy, Seeded, System, drawn_groups, poisson
from fedloom.client.session.api import CheckCancelled, Trained
from fedloom.client.training.admission import Account, Admission
from fedloom.client.training.averaging import averaged
from fedloom.client.training.data_parallel import Alone
from fedloom.client.training.gradient_terms import GradientTerms
from fedloom.client.training.gradients import Gradients
from fedloom.client.training.local_eval import Table, released, row_scores, split
from fedloom.core.config.evaluation import largest_loss
from fedloom.core.config.run import Spec, TrainSection
from fedloom.core.config.schedules import learning_rates
from fedloom.core.errors import DataError
from fedloom.core.privacy.spends import round_participation
from fedloom.core.schema import Role, Tensors
from fedloom.proto.messages import Assignment, moving

__all__ = ["EntropyFor", "Trainer"]
log = logging.getLogger(__name__)

EntropyFor = Callable[[int], Entropy]
"""Gives the randomness of one round (counted from 0)."""

_Cycle = Sequence[frozenset[str]]
"""Names of the tensors that move in each step, from the first again after the last."""


class Trainer(Admission, Gradients):
    """Trains one client's data on a model that may be shared with other trainers of the same process.

    What leaves a private run is the noised change of the adapter and, where the run and the policy ask for them, noised
    sums over held-out rows. The training loss, gradient norms, the share of clipped examples and the number of examples
    are not released, with noise or without.
    """

    def __init__(
        self,
        model: AdapterModel,
        rows: Rows,
        spec: Spec,
        policy: Policy,
        ledger: Account | None,
        *,
        personal: Path | None = None,
        entropy_for: EntropyFor | None = None,
        at_once: int = 1,
    ) -> None:
        """Tokenize the data.

        Args:
            model: Holds the base model and the adapter.
            rows: The private examples; those that the policy holds out are not trained on.
            spec: The run, already checked against `policy`.
            policy: The site's policy.
            ledger: The data set's account; a private run needs it.
            personal: Folder of what is trained and kept here. None keeps it in memory only.
            entropy_for: Test seam. None draws from the operating system in a private run, and from the run's
                seed, the round and the client's name otherwise.
            at_once: Trainers of this process that train at the same time and share its memory.

        Raises:
            DataError: There is no example.
            PolicyError: The run is private and there is no ledger or no declared size.
            ModelError: The run is private and one example could move this model's clipped sum by more than the
                noise covers, see `probe`; or an attack on the private step succeeds, see `rehearse`; or one example
                does not fit into memory.
        """
        if len(rows) == 0:
            raise DataError(f"client {policy.client.name!r} has no training example; check data.source in its policy")
        Admission.__init__(self, model.schema, spec, policy, ledger, personal=personal)
        rows, held_out = split(rows, policy.data.held_out)
        if len(rows) == 0:
            raise DataError(f"data.held_out = {policy.data.held_out:g} leaves no example to train on; lower it")
        Gradients.__init__(self, model, rows, spec, policy, at_once)
        # Rows that this run does not evaluate on are not worth their tokens.
        scored = held_out if spec.federated_evaluation.enabled else held_out.take(np.zeros(0, np.int64))
        strict = not spec.privacy.enabled
        encoded = encode(scored, model.tokenizer, spec.model.max_length, strict=strict)
        self.held_out: Encoded = model.prepared(encoded)
        self._entropy_for = entropy_for or (_system if spec.privacy.enabled else self._seeded)
        self.team: Alone = Alone()
        """Processes that do parts of each step; see `data_parallel`."""

    @property
    def declared_examples(self) -> int:
        """What the coordinator is told: the policy's figure, or without privacy the true count."""
        declared = self.policy.data.declared_examples
        return declared if declared is not None else (0 if self.spec.privacy.enabled else len(self.encoded))

    def _seeded(self, round: int) -> Entropy:
        name = int.from_bytes(hashlib.sha256(self.policy.client.name.encode()).digest()[:8], "big")
        return Seeded(self.spec.run.seed, round, name)

    def train(
        self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled = lambda: None
    ) -> Trained:
        """Do one round's steps from `broadcast`.

        In a private run the round is charged to the ledger, durably, before the first step.

        Args:
            run: The run's name.
            assignment: What to train.
            broadcast: Where to start.
            check_cancelled: Called before every step; what it raises ends the training. Its charge stays, and
                nothing of it reaches the next one.

        Raises:
            PolicyError: The assignment or the broadcast is beyond the run or the policy, see `orders`, or asks for
                what was personal before. Nothing was charged.
            ProtocolError: It trains nothing this adapter has, or something without a broadcast value.
            BudgetError: The privacy budget does not cover the round; nothing was done.
        """
        admitted = self.admit(run, assignment, broadcast)
        train, evaluating = admitted.train, admitted.evaluating
        if assignment.personal:
            # Another trainer of this process may have left its own personal values in the shared model.
            self.model.reset(assignment.personal, assignment.rank)
        self.model.show(broadcast, assignment.rank)
        self.model.load(self.personal(run), assignment.rank)
        scores = [self._row_scores()] if evaluating else []
        parameters = self.model.trainable(assignment.train)
        entropy = self._entropy_for(assignment.round)
        optimizer = self._optimizer(parameters, train, assignment.round)
        steps = self._private_steps if self.spec.privacy.enabled else self._plain_steps
        cycle = moving(self.model.schema, assignment.train, assignment.turns)
        terms = GradientTerms(parameters, train.proximal_mu, self.model.linear_terms(broadcast))
        with self.team.round(), averaged(optimizer, parameters, train.ema):
            steps(optimizer, cycle, entropy, terms, check_cancelled)
        if assignment.personal:
            self.keep_personal(run, self.model.read(self.model.schema.select(assignment.personal)))
        if evaluating and self.spec.federated_evaluation.personalised:
            scores.append(self._row_scores())
        score = self._released(scores, entropy) if evaluating else ()
        after = self.model.read(admitted.upload)
        return Trained({name: after[name] - broadcast[name] for name in after}, admitted.charge, score)

    def score(self, run: str, rounds: int, result: Tensors) -> tuple[float, ...]:
        """Figures on the model that a run ended with, as `evaluation.released`; none where they cannot be charged."""
        admitted = self.admit_result(run, rounds, result)
        if admitted is None:
            return ()
        self.model.show({**result, **self.personal(run)})
        figures = self._released([self._row_scores()], self._entropy_for(rounds))
        self.release_figures(admitted.charge, figures)
        return figures

    def _released(self, tables: list[Table], entropy: Entropy) -> tuple[float, ...]:
        noise = self.spec.federated_evaluation.noise_multiplier
        return released(tables, noise if self.spec.privacy.enabled else None, entropy)

    def _row_scores(self) -> Table:
        """What the model as it is says about the held-out rows, of which chance may have left none."""
        table = np.zeros((0, 2))

        def score(size: int) -> None:
            nonlocal table
            table = row_scores(self.model, self.held_out, size, largest_loss(self.spec))

        self.microbatch.attempt(len(self.held_out), score)
        return table

    def _optimizer(self, parameters: list[nn.Parameter], train: TrainSection, round: int) -> torch.optim.Optimizer:
        rate, head_rate = learning_rates(train, round, self.spec.run.rounds)
        head = self.model.parameters_of({Role.HEAD})
        groups = [
            {"params": [each for each in parameters if each not in head], "lr": rate},
            {"params": [each for each in parameters if each in head], "lr": head_rate},
        ]
        return optimizer_of(train).make(groups, noise_std(self.spec, self.policy.data.declared_examples))

    def _sample(self, entropy: Entropy, groups: Indices, step: int) -> Indices:
        """One Poisson sample of the group whose turn it is: each example on its own with the public rate."""
        rate, _ = round_participation(self.spec)
        sample = poisson(entropy, len(self.encoded), rate)
        turn: Indices = sample[groups[sample] == step % self.spec.privacy.noise_bands]
        return turn

    def _private_steps(
        self,
        base: torch.optim.Optimizer,
        cycle: _Cycle,
        entropy: Entropy,
        terms: GradientTerms,
        check_cancelled: CheckCancelled,
    ) -> None:
        groups = drawn_groups(entropy, len(self.encoded), self.spec.privacy.noise_bands)
        # A tape has the tensors of one turn and no others: the norm that is clipped and the noise are theirs alone.
        for names, steps in groupby(range(self.spec.train.steps), lambda step: cycle[step % len(cycle)]):
            with self.clipping(names, base, entropy) as optimizer:
                for step in steps:
                    check_cancelled()
                    # Drawn once: a step that is done again after running out of memory is a step on the same examples,
                    # whose noise is drawn when their sum is whole. A second sample would be a second look at the data
                    # that nobody has charged.
                    mine = self.team.share(names, self._sample(entropy, groups, step))
                    self.accumulate(optimizer, mine)
                    self.team.add(optimizer.grid_sum)
                    optimizer.release(terms.now(optimizer.tape.parameters))

    def _plain_steps(
        self,
        optimizer: torch.optim.Optimizer,
        cycle: _Cycle,
        entropy: Entropy,
        terms: GradientTerms,
        check_cancelled: CheckCancelled,
    ) -> None:
        everyone = np.zeros(len(self.encoded), np.int64)  # one group
        for step in range(self.spec.train.steps):
            check_cancelled()
            names = cycle[step % len(cycle)]
            parameters = self.model.trainable(names)
            sample = self._sample(entropy, everyone, step)
            if len(sample) == 0 and not terms.linear:
                continue
            # A strategy counts on every step of its term, as a private client takes every step: this one is on no data.
            optimizer.zero_grad(set_to_none=True)
            if len(sample):
                self.differentiate(parameters, self.team.share(names, sample), len(sample))
                self.team.add_gradients(parameters)
            for parameter, term in zip(parameters, terms.now(parameters), strict=False):
                parameter.grad = term if parameter.grad is None else parameter.grad + term
            optimizer.step()


def _system(_: int) -> Entropy:
    return System()
