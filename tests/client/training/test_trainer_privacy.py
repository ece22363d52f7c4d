"""What a round of training promises to a private data set."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import AdapterSection, Spec
from fedloom.core.errors import BudgetError, DataError, PolicyError, ProtocolError
from fedloom.core.privacy.accounting import Spend
from fedloom.core.privacy.gaussian import UNITS, Integers, longest
from fedloom.core.schema import Role
from tests.client.rounds import Everyone, Floats, assignment, changed, start


class NoOne(Everyone):
    """Samples no example and adds noise."""

    def uniform(self, count: int) -> Floats:
        return np.ones(count)

    def normal(self, deviation: int, count: int) -> Integers:
        return Seeded(count).normal(deviation, count)


class Killed(Exception):
    """Stands for the end of the process in the middle of a round."""


def test_a_private_round_is_charged_before_the_first_step(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny_model, rows, spec, policy, ledger)
    values = start(tiny_model)

    def die(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(tiny_model.model, "forward", die)
    with pytest.raises(Killed):
        trainer.train("run", assignment(round=1), values)

    (charge,) = ledger.charges()
    assert (charge.run, charge.round, charge.spend, charge.digest) == ("run", 1, Spend(0.3, 1.0, 3), None)


def test_a_spent_budget_trains_nothing(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor = policy.model_copy(update={"privacy": policy.privacy.model_copy(update={"epsilon": 0.1})})
    trainer = Trainer(tiny_model, rows, spec, poor, ledger)
    before = tiny_model.read(tiny_model.schema)
    monkeypatch.setattr(tiny_model, "logits", lambda _: pytest.fail("the data was read"))

    with pytest.raises(BudgetError):
        trainer.train("run", assignment(), start(tiny_model))

    assert ledger.charges() == []
    for name, value in tiny_model.read(tiny_model.schema).items():
        np.testing.assert_array_equal(value, before[name])


def test_release_notes_the_digest_of_the_charge(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    trainer = Trainer(tiny_model, rows, spec, policy, ledger)

    trained = trainer.train("run", assignment(), start(tiny_model))
    trainer.release(trained.charge, "sent")

    assert [(charge.number, charge.digest) for charge in ledger.charges()] == [(trained.charge, "sent")]


def test_a_private_run_needs_a_ledger_and_a_declared_size(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    undeclared = policy.model_copy(update={"data": policy.data.model_copy(update={"declared_examples": None})})

    with pytest.raises(PolicyError, match="needs a ledger"):
        Trainer(tiny_model, rows, spec, policy, None)
    with pytest.raises(PolicyError, match="declared_examples"):
        Trainer(tiny_model, rows, spec, undeclared, ledger)
    with pytest.raises(DataError, match="no training example"):
        Trainer(tiny_model, rows.take(np.array([], np.int64)), spec, policy, ledger)


def test_the_coordinator_is_told_the_declared_size_only(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, plain: Spec, policy: Policy, ledger: Ledger
) -> None:
    rounded = policy.model_copy(update={"data": policy.data.model_copy(update={"declared_examples": 100})})
    undeclared = policy.model_copy(update={"data": policy.data.model_copy(update={"declared_examples": None})})

    assert Trainer(tiny_model, rows, spec, rounded, ledger).declared_examples == 100
    assert Trainer(tiny_model, rows, plain, rounded, None).declared_examples == 100
    assert Trainer(tiny_model, rows, plain, undeclared, None).declared_examples == 40


def test_the_divisor_is_the_declared_size(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    doubled = policy.model_copy(update={"data": policy.data.model_copy(update={"declared_examples": 80})})
    one = changed(spec, train={"steps": 1})
    values = start(tiny_model)

    deltas = [
        Trainer(tiny_model, rows, one, site, ledger, entropy_for=lambda _: Everyone())
        .train("run", assignment(), values)
        .delta
        for site in (policy, doubled)
    ]

    for name in values:
        np.testing.assert_allclose(deltas[0][name], 2 * deltas[1][name], rtol=1e-5, atol=1e-6)


def test_an_empty_sample_is_pure_noise_in_private_and_no_step_otherwise(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, plain: Spec, policy: Policy, ledger: Ledger
) -> None:
    values = start(tiny_model)
    one = changed(spec, train={"steps": 1, "sampling_rate": 1e-6})

    still = Trainer(tiny_model, rows, plain, policy, None, entropy_for=lambda _: NoOne())
    moved = Trainer(tiny_model, rows, one, policy, ledger, entropy_for=lambda _: NoOne())

    assert not any(value.any() for value in still.train("run", assignment(), values).delta.values())
    delta = moved.train("run", assignment(), values).delta
    flat = np.concatenate([delta[spec.name].reshape(-1) for spec in tiny_model.schema.tensors])
    scale = one.train.learning_rate * 1.0 * one.privacy.clip_norm / (1e-6 * 40)
    size = tiny_model.schema.size
    noise = NoOne().normal(UNITS, size) / longest(size)
    np.testing.assert_allclose(flat, -scale * noise, rtol=1e-4, atol=1e-6 * scale)


def test_what_stays_with_the_client_has_the_noise_of_what_is_sent(
    build_model: Callable[[AdapterSection], AdapterModel], rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    """Gradients on a shared pair depend on the own one: its training is in the same clipped and noised sum."""
    model = build_model(AdapterSection(kind="dual-lora", rank=2))
    one = changed(spec, train={"steps": 1, "sampling_rate": 1e-6})
    values, words = start(model), frozenset({"shared", "own", Role.HEAD})
    trainer = Trainer(model, rows, one, policy, ledger, entropy_for=lambda _: NoOne())

    sent = trainer.train("run", assignment(words, personal=frozenset({"own"}), broadcast_roles=words), values).delta

    kept = trainer.personal("run")
    assert kept.keys() == model.schema.names("own")
    assert not sent.keys() & kept.keys()
    moved = sent | {name: value - values[name] for name, value in kept.items()}
    flat = np.concatenate([moved[each.name].reshape(-1) for each in model.schema.tensors])
    scale = one.train.learning_rate * one.privacy.clip_norm / (1e-6 * 40)
    noise = NoOne().normal(UNITS, model.schema.size) / longest(model.schema.size)
    np.testing.assert_allclose(flat, -scale * noise, rtol=1e-4, atol=1e-6 * scale)


def test_a_tiny_rate_on_real_entropy_trains(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    rare = changed(spec, train={"sampling_rate": 1e-9, "learning_rate": 1e-6})

    delta = Trainer(tiny_model, rows, rare, policy, ledger).train("run", assignment(), start(tiny_model)).delta

    assert all(np.isfinite(value).all() and value.any() for value in delta.values())


def clipped_sum(model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger) -> Floats:
    """Sum of clipped per-example gradients over all rows, as one private step without noise gives it."""
    one = changed(spec, train={"steps": 1, "learning_rate": 100.0, "sampling_rate": 0.5})
    trainer = Trainer(model, rows, one, policy, ledger, entropy_for=lambda _: Everyone())
    # A run of its own: an account stops a run whose charges come to nothing one after the other.
    delta = trainer.train(f"run-{len(ledger.spends())}", assignment(), start(model)).delta
    return (
        -np.concatenate([delta[s.name].reshape(-1) for s in model.schema.tensors]).astype(np.float64) * 0.5 * 40 / 100
    )


LONG = Rows(("the film " * 200,), np.array([1]), ("",), ("negative", "positive"))


def joined(first: Rows, second: Rows) -> Rows:
    labels = np.concatenate([first.labels, second.labels])
    return Rows(first.texts + second.texts, labels, first.groups + second.groups, first.label_names)


# A loss divided by the batch's tokens or labels would let one long example rescale everyone's gradient. With a
# bound that clips no one such a rescaling would show in full; with a small one the bound itself is on trial.
@pytest.mark.parametrize("clip_norm", [1e-2, 0.7, 1e3])
def test_one_example_contributes_only_its_own_clipped_gradient(
    clip_norm: float, tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    chosen = changed(spec, privacy={"clip_norm": clip_norm}, train={"microbatch": 64})
    short, rest = rows.take(np.array([0])), rows.take(np.arange(1, 12))

    def total(part: Rows) -> Floats:
        return clipped_sum(tiny_model, part, chosen, policy, ledger)

    alone, without, added = total(LONG), total(rest), total(joined(rest, LONG))

    # float32 sums: 1e-4 of a gradient's own norm.
    slack = 1e-4 * max(float(np.linalg.norm(alone)), float(np.linalg.norm(without)))
    assert np.linalg.norm(added - without - alone) <= slack
    assert np.linalg.norm(alone) <= clip_norm * (1 + 1e-4)
    replaced = np.linalg.norm(added - total(joined(rest, short)))
    assert 0 < replaced <= 2 * clip_norm * (1 + 1e-4)


def test_an_example_that_gives_nan_changes_no_other(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    poison = Rows(("zebra film",), np.array([1]), ("",), ("negative", "positive"))
    embedding = tiny_model.model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[tiny_model.tokenizer.convert_tokens_to_ids("zebra")] = float("nan")
    few = rows.take(np.arange(8))

    healthy = clipped_sum(tiny_model, few, spec, policy, ledger)
    with_poison = clipped_sum(tiny_model, joined(few, poison), spec, policy, ledger)

    assert np.linalg.norm(healthy) > 1e-3
    np.testing.assert_allclose(with_poison, healthy, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("local", "message"),
    [
        ({"sampling_rate": 1.0}, "tries to set sampling_rate"),
        ({"clip_norm": 9.0}, "tries to set clip_norm"),
        ({"learning_rate": float("nan")}, "learning_rate to nan"),
        ({"momentum": 1.0}, "momentum to 1.0"),
    ],
)
def test_overrides_beyond_the_harmless_are_refused_uncharged(
    local: dict[str, float],
    message: str,
    tiny_model: AdapterModel,
    rows: Rows,
    spec: Spec,
    policy: Policy,
    ledger: Ledger,
) -> None:
    with pytest.raises(PolicyError, match=message):
        Trainer(tiny_model, rows, spec, policy, ledger).train("run", assignment(local=local), start(tiny_model))
    assert ledger.charges() == []


def test_an_order_that_cannot_be_trained_is_refused_uncharged(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    trainer = Trainer(tiny_model, rows, spec, policy, ledger)

    with pytest.raises(ProtocolError, match="asks to train bias; this adapter has head, lora_A, lora_B"):
        trainer.train("run", assignment(frozenset({Role.BIAS})), start(tiny_model))
    with pytest.raises(ProtocolError, match="not in the broadcast"):
        trainer.train("run", assignment(), {})
    assert ledger.charges() == []
