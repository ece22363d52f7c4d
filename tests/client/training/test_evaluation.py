"""Federated evaluation at one client: what is scored, what is released of it, and what it costs."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.eval.score import evaluate
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy, check_spec
from fedloom.client.privacy.dp_sgd.rng import System
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.outbox import OutboxEntry, keep, kept
from fedloom.client.training.local_eval import released, row_scores, split
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.evaluation import FederatedEvaluationSection, largest_loss
from fedloom.core.config.run import Spec
from fedloom.core.errors import BudgetError, DataError, PolicyError
from fedloom.core.privacy.accounting import Spend, epsilon
from fedloom.core.privacy.gaussian import Integers
from fedloom.core.schema import Role
from fedloom.proto.messages import UpdateHeader
from tests.client.rounds import Everyone, assignment, start

SHARE = 0.4


class Ones(Everyone):
    """Samples every example; all of its noise is 1."""

    def normal(self, deviation: int, count: int) -> Integers:
        return np.full(count, deviation)


def evaluating(spec: Spec, private: bool = True, **section: Any) -> Spec:
    scored = FederatedEvaluationSection(enabled=True, **section)
    privacy = spec.privacy.model_copy(update={"enabled": private})
    return spec.model_copy(update={"federated_evaluation": scored, "privacy": privacy})


@pytest.fixture
def site(policy: Policy) -> Policy:
    """A site that holds rows out."""
    return policy.model_copy(update={"data": policy.data.model_copy(update={"held_out": SHARE})})


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger", "sha256:" + "0" * 64) as opened:
        yield opened


def test_a_rows_side_is_its_own(rows: Rows) -> None:
    trained, held_out = split(rows, SHARE)
    assert len(trained) + len(held_out) == len(rows)
    assert len(held_out) > 0
    for gone in range(len(rows)):
        fewer = rows.take(np.delete(np.arange(len(rows)), gone))
        for before, after in zip((trained, held_out), split(fewer, SHARE), strict=True):
            assert [text for text in before.texts if text != rows.texts[gone]] == list(after.texts)
    assert set(held_out.texts) <= set(split(rows, 2 * SHARE)[1].texts), "a larger share only moves more rows over"


def test_scores_of_rows_are_those_of_each_row_alone(tiny_model: AdapterModel, rows: Rows) -> None:
    tiny_model.load(start(tiny_model))
    encoded = encode(rows, tiny_model.tokenizer, 16)
    found = row_scores(tiny_model, encoded, 7, max_loss=2.0)
    naive = []
    for i in range(len(rows)):
        batch = collate(encoded, np.array([i]), tiny_model.tokenizer.pad_token_id)
        with torch.no_grad():
            log_p = torch.log_softmax(tiny_model.logits(batch)[0].double(), -1)
        naive.append((float(log_p.argmax() == rows.labels[i]), min(1.0, -float(log_p[rows.labels[i]]) / 2.0)))
    assert np.allclose(found.sum(0), np.sum(naive, 0), atol=1e-5)
    assert np.allclose(np.sort(found[:, 1]), np.sort([loss for _, loss in naive]), atol=1e-6)
    whole = evaluate(tiny_model, encoded)
    assert found[:, 0].mean() == pytest.approx(whole.accuracy)
    assert row_scores(tiny_model, encoded, 64, 1e9)[:, 1].mean() * 1e9 == pytest.approx(whole.loss, rel=1e-4)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e30])
def test_no_model_makes_a_row_count_for_more_than_one(tiny_model: AdapterModel, rows: Rows, broken: float) -> None:
    values = start(tiny_model)
    head = next(each.name for each in tiny_model.schema.tensors if each.role == Role.HEAD)
    values[head] = np.full_like(values[head], broken)
    tiny_model.load(values)
    found = row_scores(tiny_model, encode(rows, tiny_model.tokenizer, 16), 64, max_loss=0.1)
    assert np.isfinite(found).all()
    assert found.min() >= 0
    assert found.max() <= 1


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8),
    st.data(),
)
def test_one_row_moves_what_is_released_by_one_at_most(rows: list[tuple[float, ...]], data: st.DataObject) -> None:
    table, gone = np.array(rows), data.draw(st.integers(0, len(rows) - 1))
    fewer = np.delete(table, gone, 0)
    for count in (1, 2):
        parts, rest = ([whole[:, 2 * i : 2 * i + 2] for i in range(count)] for whole in (table, fewer))
        moved = np.subtract(released(parts, None, System()), released(rest, None, System()))
        assert np.linalg.norm(moved) <= 1 + 1e-5


def test_the_largest_row_moves_it_by_one() -> None:
    """So the noise multiplier is over the sensitivity itself, not over a loose bound of it."""
    for count in (1, 2):
        assert np.linalg.norm(released([np.ones((1, 2))] * count, None, System())) == pytest.approx(1)


def test_noise_has_the_promised_spread() -> None:
    table = np.array([[1.0, 0.5]] * 3)
    drawn = np.array([released([table], 7.0, System()) for _ in range(4000)])
    exact = np.array(released([table], None, System()))
    assert np.allclose(drawn.std(0), 7.0, rtol=0.06)  # five standard errors of a standard deviation
    assert np.allclose(drawn.mean(0), exact, atol=5 * 7 / np.sqrt(4000))


@pytest.mark.parametrize("personalised", [False, True])
def test_a_private_round_releases_noised_sums_and_pays_for_them(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, site: Policy, ledger: Ledger, personalised: bool
) -> None:
    spec = evaluating(spec, noise_multiplier=9.0, personalised=personalised)
    values = start(tiny_model)
    trained = Trainer(tiny_model, rows, spec, site, ledger, entropy_for=lambda _: Ones()).train(
        "run", assignment(), values
    )

    encoded = encode(split(rows, SHARE)[1], tiny_model.tokenizer, 16)
    after = {name: value + trained.delta[name] for name, value in values.items()}
    tables = []
    for adapter in (values, after)[: 1 + personalised]:
        tiny_model.load(adapter)
        tables.append(row_scores(tiny_model, encoded, 64, largest_loss(spec)))
    assert np.allclose(trained.score, np.add(released(tables, None, System()), 9.0), atol=1e-4)

    (charge,) = ledger.charges()
    assert (charge.spend, charge.evaluation) == (Spend(0.3, 1.0, 3), Spend(1.0, 9.0, 1))
    assert ledger.epsilon(1e-5) == epsilon([Spend(0.3, 1.0, 3), Spend(1.0, 9.0, 1)], 1e-5)
    assert ledger.epsilon(1e-5) > epsilon([Spend(0.3, 1.0, 3)], 1e-5)


def test_the_result_is_scored_once_with_noise_and_for_a_price(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, site: Policy, ledger: Ledger
) -> None:
    spec = evaluating(spec, noise_multiplier=9.0, personalised=True)
    trainer = Trainer(tiny_model, rows, spec, site, ledger, entropy_for=lambda _: Ones())
    result = {name: value + np.float32(0.01) for name, value in start(tiny_model).items()}

    figures = trainer.score("run", spec.run.rounds, result)

    encoded = encode(split(rows, SHARE)[1], tiny_model.tokenizer, 16)
    tiny_model.load(result)
    exact = released([row_scores(tiny_model, encoded, 64, largest_loss(spec))], None, System())
    assert np.allclose(figures, np.add(exact, 9.0), atol=1e-4)
    (charge,) = ledger.charges()
    assert (charge.spends, charge.result) == ((Spend(1.0, 9.0, 1),), True)
    assert charge.digest is not None, "what left is in the ledger"
    assert ledger.statement(1e-5).rounds == 0, "nothing was trained"
    assert trainer.score("run", spec.run.rounds, result) == (), "there is no second look"
    assert trainer.score("run", spec.run.rounds + 1, result) == (), "no run has so many rounds"
    assert len(ledger.charges()) == 1


def test_a_result_that_cannot_be_paid_for_is_not_scored(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, site: Policy, ledger: Ledger
) -> None:
    poor = site.model_copy(update={"privacy": site.privacy.model_copy(update={"epsilon": 1e-3})})
    trainer = Trainer(tiny_model, rows, evaluating(spec), poor, ledger)

    assert trainer.score("run", 1, start(tiny_model)) == ()
    assert not ledger.charges()


def test_an_open_run_scores_its_result_as_it_is(tiny_model: AdapterModel, rows: Rows, spec: Spec, site: Policy) -> None:
    trainer = Trainer(tiny_model, rows, evaluating(spec, private=False), site, None)

    figures = trainer.score("run", 1, start(tiny_model))

    assert figures[0] == pytest.approx(len(split(rows, SHARE)[1]) / 3**0.5)


def test_the_noise_is_the_systems_own(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, site: Policy, ledger: Ledger
) -> None:
    spec = evaluating(spec)
    one = Trainer(tiny_model, rows, spec, site, ledger).train("one", assignment(), start(tiny_model))
    two = Trainer(tiny_model, rows, spec, site, ledger).train("two", assignment(), start(tiny_model))
    assert len(one.score) == 3
    assert not set(one.score) & set(two.score)


def test_held_out_rows_are_not_trained_on(tiny_model: AdapterModel, rows: Rows, spec: Spec, site: Policy) -> None:
    plain, values = evaluating(spec, private=False), start(tiny_model)
    _, held_out = split(rows, SHARE)
    turned = np.array(
        [1 - label if text in held_out.texts else label for text, label in zip(rows.texts, rows.labels, strict=True)]
    )
    other = Rows(rows.texts, turned, rows.groups, rows.label_names)
    one, two = (
        Trainer(tiny_model, each, plain, site, None).train("run", assignment(), values) for each in (rows, other)
    )
    for name, delta in one.delta.items():
        assert np.array_equal(delta, two.delta[name])
    assert one.score[1] * np.sqrt(3) == pytest.approx(len(held_out) - two.score[1] * np.sqrt(3), abs=1e-5)
    assert Trainer(tiny_model, rows, plain, site, None).declared_examples == 40


def test_a_round_is_evaluated_once(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, site: Policy, ledger: Ledger
) -> None:
    """A second look at the same rows would cost more than the run has planned for."""
    trainer = Trainer(tiny_model, rows, evaluating(spec), site, ledger)
    assert len(trainer.train("run", assignment(), start(tiny_model)).score) == 3
    assert trainer.train("run", assignment(), start(tiny_model)).score == ()
    assert [charge.evaluation is None for charge in ledger.charges()] == [False, True]
    assert len(trainer.train("run", assignment(round=1), start(tiny_model)).score) == 3


def test_rounds_between_evaluations_release_and_cost_nothing_more(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, site: Policy, ledger: Ledger
) -> None:
    longer = spec.model_copy(update={"run": spec.run.model_copy(update={"rounds": 3})})
    trainer = Trainer(tiny_model, rows, evaluating(longer, every=2), site, ledger)
    assert [len(trainer.train("run", assignment(round=each), start(tiny_model)).score) for each in range(3)] == [
        3,
        0,
        3,
    ]
    assert [charge.evaluation is None for charge in ledger.charges()] == [False, True, False]


def test_the_budget_covers_the_evaluation_too(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, site: Policy, ledger: Ledger
) -> None:
    training = epsilon([Spend(0.3, 1.0, 3)], site.privacy.delta)
    poor = site.model_copy(update={"privacy": site.privacy.model_copy(update={"epsilon": training + 1e-3})})
    with pytest.raises(BudgetError):
        Trainer(tiny_model, rows, evaluating(spec), poor, ledger).train("run", assignment(), start(tiny_model))
    assert ledger.charges() == []


def test_a_site_that_holds_nothing_out_refuses(spec: Spec, policy: Policy, site: Policy) -> None:
    with pytest.raises(PolicyError, match=r"data.held_out = 0; set it"):
        check_spec(policy, evaluating(spec))
    check_spec(site, evaluating(spec))
    with pytest.raises(PolicyError, match=r"noise multiplier 0.2 in evaluations \(at least 0.3\)"):
        check_spec(site, evaluating(spec, noise_multiplier=0.2))


def test_rows_that_are_all_held_out_are_an_error(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, site: Policy
) -> None:
    _, held_out = split(rows, SHARE)
    with pytest.raises(DataError, match=r"data.held_out = 0.4 leaves no example to train on"):
        Trainer(tiny_model, held_out, evaluating(spec, private=False), site, None)


def test_no_held_out_row_is_noise_alone(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, site: Policy, ledger: Ledger
) -> None:
    trained, _ = split(rows, SHARE)
    trainer = Trainer(tiny_model, trained, evaluating(spec), site, ledger, entropy_for=lambda _: Ones())
    assert trainer.train("run", assignment(), start(tiny_model)).score == pytest.approx((10, 10, 10), rel=2e-6)


def test_spooled_figures_are_sent_as_they_were(tmp_path: Path) -> None:
    header = UpdateHeader("site", 0, "0" * 64, "fp32", 2, hashlib.sha256(b"ab").hexdigest())
    for score in ((), (0.1, -2.5, 1e-17)):
        update = OutboxEntry("run", 1, UpdateHeader(**{**vars(header), "score": score}), b"ab", None)
        keep(tmp_path, update)
        assert kept(tmp_path, "run", "site") == update
