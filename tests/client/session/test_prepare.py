"""What a client does and says between learning of a run and training: the cheapest check first."""

import csv
from pathlib import Path

import pytest

from fedloom.client.data.rows import Rows
from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger.account import open_account
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session import prepare as module
from fedloom.client.session.prepare import prepare
from fedloom.core.config.run import Spec
from fedloom.core.errors import BudgetError
from fedloom.core.privacy.accounting import epsilon
from fedloom.core.privacy.spends import training_spend


@pytest.fixture
def site(policy: Policy, rows: Rows, spec: Spec, tmp_path: Path) -> Policy:
    """A policy with data, whose budget buys one round."""
    source = tmp_path / "data.csv"
    with source.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(zip(rows.texts, rows.labels, strict=True))
    one = epsilon([training_spend(spec)], policy.privacy.delta)
    return policy.model_copy(
        update={
            "data": policy.data.model_copy(update={"source": str(source)}),
            "privacy": policy.privacy.model_copy(update={"epsilon": one}),
        }
    )


def spend_all(site: Policy, rows: Rows, spec: Spec) -> None:
    with open_account(site, rows) as ledger:
        ledger.reserve("before", 0, training_spend(spec), budget=site.privacy.epsilon, delta=site.privacy.delta)


def test_the_budget_and_what_it_buys_are_said_before_the_model_is_loaded(
    site: Policy, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def load(*_: object) -> None:
        assert len(said) == 3
        raise InterruptedError

    monkeypatch.setattr(module, "load_model", load)
    for _ in range(2):  # the second time: a failure has closed the ledger
        said.clear()
        with pytest.raises(InterruptedError):
            prepare(site, spec, announce=said.append)

    assert said[0].startswith(f"epsilon 0.0000 of {site.privacy.epsilon:g} is spent at delta 1e-05")
    assert said[0].endswith("the rest buys 1 of the 2 rounds of run 'tiny'")


def test_a_run_of_which_no_round_can_be_paid_is_refused_before_the_model_is_loaded(
    site: Policy, rows: Rows, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("the model was loaded"))
    spend_all(site, rows, spec)

    with pytest.raises(BudgetError, match=r"buys 0 of the 2 rounds of run 'tiny': not even one"):
        prepare(site, spec)


def test_a_client_that_still_owes_a_paid_update_joins_without_a_budget(site: Policy, rows: Rows, spec: Spec) -> None:
    spend_all(site, rows, spec)

    trainer = prepare(site, spec, owing=True)

    assert isinstance(trainer.ledger, Ledger)
    trainer.ledger.close()


def test_a_run_without_privacy_opens_no_account(site: Policy, spec: Spec) -> None:
    open_run = spec.model_copy(update={"privacy": spec.privacy.model_copy(update={"enabled": False})})

    said: list[str] = []
    trainer = prepare(site, open_run, announce=said.append)

    assert trainer.ledger is None
    assert [line.split()[0] for line in said] == ["loading", "ready;"], "of what it does, and nothing of a budget"
    assert not site.client.state.exists()
