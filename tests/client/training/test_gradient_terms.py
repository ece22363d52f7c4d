"""A term that a strategy adds to gradients: what it moves, and that the private step under it is what it was."""

from typing import Any

import numpy as np
import pytest
import torch

from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec
from fedloom.core.errors import PolicyError
from fedloom.core.schema import Array, Role, linear_name
from tests.client.rounds import Everyone, assignment, changed, start

LINEAR = frozenset({Role.LORA_B, Role.HEAD})


def terms(model: AdapterModel, size: float = 1.0, rank: int | None = None) -> dict[str, Array]:
    schema = model.schema if rank is None else model.schema.with_rank(rank)
    rng = np.random.default_rng(8)
    return {s.name: rng.normal(0, size, s.shape).astype(np.float32) for s in schema.select(LINEAR).tensors}


def with_terms(values: dict[str, Array], linear: dict[str, Array]) -> dict[str, Array]:
    """A broadcast as a client decodes it."""
    return {**values, **{linear_name(name): each for name, each in linear.items()}}


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("rank", [None, 2])
def test_a_step_goes_against_the_term_as_well(
    private: bool,
    rank: int | None,
    tiny_model: AdapterModel,
    rows: Rows,
    spec: Spec,
    plain: Spec,
    policy: Policy,
    ledger: Ledger,
) -> None:
    train = {"learning_rate": 0.3, "head_learning_rate": 0.7, "steps": 1}
    chosen = changed(spec if private else plain, train=train)
    trainer = Trainer(tiny_model, rows, chosen, policy, ledger if private else None, entropy_for=lambda _: Everyone())
    values, linear = start(tiny_model, rank=rank), terms(tiny_model, rank=rank)

    free = trainer.train("free", assignment(rank=rank), values).delta
    order = assignment(rank=rank, linear=LINEAR)
    moved = trainer.train("run", order, with_terms(values, linear)).delta

    heads = tiny_model.schema.names(Role.HEAD)
    for name, each in free.items():
        expected = each - (0.7 if name in heads else 0.3) * linear[name] if name in linear else each
        np.testing.assert_allclose(moved[name], expected, rtol=0, atol=2e-6)
    for pair in tiny_model.schema.pairs:
        assert not tiny_model.read(tiny_model.schema)[pair.b][:, (rank or 4) :].any()


def test_mean_gradients_of_plain_steps_are_read_off_the_change(
    tiny_model: AdapterModel, rows: Rows, plain: Spec, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-delta / (K eta) less the term is what SCAFFOLD takes for it; here it is compared with what torch was given."""
    chosen = changed(plain, train={"learning_rate": 0.2, "steps": 5, "sampling_rate": 0.3})
    trainer, seen = Trainer(tiny_model, rows, chosen, policy, None, entropy_for=lambda _: Seeded(3)), []
    mean = trainer._mean

    def watched(*arguments: Any) -> None:
        mean(*arguments)
        grads = {name: slot.parameter.grad for name, slot in tiny_model.slots.items()}
        seen.append({name: grad.numpy().copy() for name, grad in grads.items() if grad is not None})

    monkeypatch.setattr(trainer, "_mean", watched)
    values, linear = start(tiny_model), terms(tiny_model)

    delta = trainer.train("run", assignment(linear=LINEAR), with_terms(values, linear)).delta

    assert len(seen) == 5
    for name, each in delta.items():
        told = -each / (5 * 0.2) - linear.get(name, 0)
        np.testing.assert_allclose(told, sum(grads[name] for grads in seen) / 5, rtol=0, atol=2e-5)


def test_a_step_on_no_rows_goes_against_the_term_alone(
    tiny_model: AdapterModel, rows: Rows, plain: Spec, policy: Policy
) -> None:
    class Nobody(Everyone):
        def uniform(self, count: int) -> Any:
            return np.ones(count)

    chosen = changed(plain, train={"learning_rate": 0.25, "steps": 3, "sampling_rate": 0.5})
    trainer = Trainer(tiny_model, rows, chosen, policy, None, entropy_for=lambda _: Nobody())
    values, linear = start(tiny_model), terms(tiny_model)

    still = trainer.train("still", assignment(), values).delta
    moved = trainer.train("run", assignment(linear=LINEAR), with_terms(values, linear)).delta

    assert not any(each.any() for each in still.values())
    for name, each in moved.items():
        np.testing.assert_allclose(each, -0.75 * linear[name] if name in linear else 0 * each, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 20.0])
def test_the_private_step_and_its_price_do_not_depend_on_the_term(
    size: float,
    tiny_model: AdapterModel,
    rows: Rows,
    spec: Spec,
    policy: Policy,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clipped sum with its noise is the same to the last bit: a term joins after both, whatever its length."""
    chosen = changed(spec, train={"steps": 1, "learning_rate": 0.5})
    released: list[torch.Tensor] = []
    noised = PrivateOptimizer.add_noise

    def watched(self: PrivateOptimizer) -> None:
        noised(self)
        released.append(torch.cat([p.grad.flatten() for p in self.tape.parameters if p.grad is not None]).clone())

    monkeypatch.setattr(PrivateOptimizer, "add_noise", watched)
    trainer = Trainer(tiny_model, rows, chosen, policy, ledger, entropy_for=lambda _: Seeded(3))
    values = start(tiny_model)

    trainer.train("free", assignment(), values)
    trainer.train("run", assignment(linear=LINEAR), with_terms(values, terms(tiny_model, size)))

    free, with_term = released
    assert torch.equal(free, with_term)
    one, other = ledger.charges()
    assert (one.spend, one.evaluation) == (other.spend, other.evaluation)


def test_the_noise_of_a_private_round_stays_under_a_term(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    """Two noises, one term: the rounds differ by the noises' difference and by nothing of the term."""
    chosen = changed(spec, train={"steps": 1, "learning_rate": 0.5})
    values = start(tiny_model)

    def difference(linear: dict[str, Array]) -> dict[str, Array]:
        order = assignment(linear=frozenset(linear))
        ends = [
            Trainer(tiny_model, rows, chosen, policy, ledger, entropy_for=lambda _, seed=seed: Seeded(seed))  # type: ignore[misc]
            .train(f"run-{seed}-{len(linear)}", order, with_terms(values, linear))
            .delta
            for seed in (1, 2)
        ]
        return {name: ends[1][name] - ends[0][name] for name in ends[0]}

    free, moved = difference({}), difference(terms(tiny_model, 3.0))

    assert max(float(np.abs(each).max()) for each in free.values()) > 1e-3
    for name, each in free.items():
        np.testing.assert_allclose(moved[name], each, rtol=0, atol=2e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 101.0])
def test_a_term_that_no_training_comes_to_is_refused_before_the_charge(
    value: float, tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    trainer = Trainer(tiny_model, rows, spec, policy, ledger)
    linear = terms(tiny_model)
    name = next(iter(linear))
    linear[name].flat[0] = value

    with pytest.raises(PolicyError, match=r"the term for the gradient of '.*' has a value of .*limits\.max_weight"):
        trainer.train("run", assignment(linear=LINEAR), with_terms(start(tiny_model), linear))

    assert ledger.charges() == []
    trainer.train("run", assignment(linear=LINEAR), with_terms(start(tiny_model), terms(tiny_model)))
    assert len(ledger.charges()) == 1
