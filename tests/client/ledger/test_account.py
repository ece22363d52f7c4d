"""Which account data is charged to, and what is said about it before a run."""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.data.rows import Rows
from fedloom.client.policy import Policy, load_policy
from fedloom.client.privacy.ledger.account import anchors_folder, ledger_folder, open_account
from fedloom.client.privacy.ledger.anchor import default_anchors
from fedloom.client.privacy.ledger.budget import check_affordable, outlook, rounds_left
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.privacy.ledger.statement import statement
from fedloom.core.config.evaluation import FederatedEvaluationSection
from fedloom.core.config.run import Spec
from fedloom.core.errors import BudgetError, LedgerError, PolicyError
from fedloom.core.privacy.accounting import REPORT_GRID, Spend, epsilon
from fedloom.core.privacy.accounting import statement as terms
from fedloom.core.privacy.spends import evaluation_spend, training_spend

SPEND = Spend(0.3, 1.0, 3)


def rows(*texts: str) -> Rows:
    return Rows(texts, np.zeros(len(texts), np.int64), ("",) * len(texts), ("a", "b"))


def site(policy: Policy, folder: Path) -> Policy:
    return policy.model_copy(update={"client": policy.client.model_copy(update={"state": folder})})


@pytest.mark.parametrize(
    "texts", [("b", "a"), ("a", "b", "c"), ("a",), ("c",)], ids=["reordered", "grown", "shrunk", "replaced"]
)
def test_data_that_changes_is_charged_to_the_same_account(policy: Policy, texts: tuple[str, ...]) -> None:
    with open_account(policy, rows("a", "b")) as ledger:
        account = ledger.account
        ledger.reserve("run", 0, SPEND, budget=50, delta=1e-5)

    with open_account(policy, rows(*texts)) as again:
        assert again.account == account
        assert len(again.charges()) == 1


def test_the_same_examples_get_no_fresh_budget_in_another_folder(policy: Policy, tmp_path: Path) -> None:
    open_account(policy, rows("a", "b", "c")).close()
    open_account(policy, rows("d")).close()  # the account keeps what it was ever used for

    for texts, shared in (("c", "x"), 1), (("x", "b", "a"), 2), (("d",), 1):
        with pytest.raises(LedgerError, match=f"{shared} of {len(texts)} texts are charged to another account"):
            open_account(site(policy, tmp_path / "fresh"), rows(*texts))
    with open_account(site(policy, tmp_path / "fresh"), rows("x", "y")) as other:
        assert other.charges() == []


def test_the_records_do_not_tell_which_texts_they_are_about(policy: Policy) -> None:
    open_account(policy, rows("a", "b")).close()
    (record,) = default_anchors().glob("*.examples")
    sketched = record.with_suffix(".sketches")
    first, drawn = record.read_bytes(), sketched.read_bytes()
    assert (len(first), len(drawn)) == (32, 128)

    for path in (record, sketched, default_anchors() / "examples.key"):
        path.unlink()
    open_account(policy, rows("a", "b")).close()

    assert not {first[:16], first[16:]} & {record.read_bytes()[:16], record.read_bytes()[16:]}
    assert not {drawn[:64], drawn[64:]} & {sketched.read_bytes()[:64], sketched.read_bytes()[64:]}


@pytest.mark.parametrize("name", ["examples.key", "*.examples", "*.sketches"])
def test_records_that_were_cut_are_refused(policy: Policy, tmp_path: Path, name: str) -> None:
    open_account(policy, rows("a")).close()
    (path,) = default_anchors().glob(name)
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(LedgerError, match="restore it from a backup"):
        open_account(site(policy, tmp_path / "fresh"), rows("b"))


def test_the_policy_says_where_anchors_lie(policy: Policy, tmp_path: Path) -> None:
    assert anchors_folder(policy) == default_anchors() == tmp_path / "xdg" / "fedloom"
    path = tmp_path / "policy.toml"
    path.write_text('[client]\nname = "a"\nanchors = "witness"\n[data]\nsource = "x.csv"\n')

    mine = load_policy(path)
    open_account(mine, rows("a")).close()

    assert anchors_folder(mine) == tmp_path / "witness"
    assert len(list((tmp_path / "witness").glob("*.anchor"))) == 1
    assert not list(ledger_folder(mine).glob("*.anchor"))


@pytest.mark.parametrize("budgeted", [0, 1, 4, 7])
def test_rounds_left_is_what_reserve_allows(policy: Policy, tmp_path: Path, budgeted: int) -> None:
    budget = epsilon([Spend(0.3, 1.0, 3 * budgeted)], 1e-5) if budgeted else 0.01
    poor = policy.privacy.model_copy(update={"epsilon": budget})
    with Ledger(tmp_path, "ab") as ledger:
        for done in range(budgeted):
            assert rounds_left(ledger, SPEND, poor, 100) == budgeted - done
            ledger.release(ledger.reserve("run", done, SPEND, budget=budget, delta=poor.delta), "sent")

        assert rounds_left(ledger, SPEND, poor, 100) == 0
        with pytest.raises(BudgetError):
            ledger.reserve("run", 99, SPEND, budget=budget, delta=poor.delta)


@pytest.mark.parametrize("most", [0, 1, 2, 5, 8])
def test_rounds_left_stops_where_it_is_told(policy: Policy, tmp_path: Path, most: int) -> None:
    with Ledger(tmp_path, "ab") as ledger:
        assert rounds_left(ledger, Spend(0.01, 100.0, 1), policy.privacy, most) == most


def test_the_outlook_names_every_figure_and_a_run_without_a_round_is_refused(
    policy: Policy, spec: Spec, tmp_path: Path
) -> None:
    one = epsilon([SPEND], policy.privacy.delta)
    poor = policy.privacy.model_copy(update={"epsilon": one})
    with Ledger(tmp_path, "ab") as ledger:
        before = outlook(ledger, spec, poor)
        check_affordable(before)
        ledger.reserve("run", 0, SPEND, budget=one, delta=poor.delta)
        after = outlook(ledger, spec, poor)

    assert str(before) == (
        f"epsilon 0.0000 of {one:g} is spent at delta 1e-05 over the life of this data; "
        "the rest buys 1 of the 2 rounds of run 'tiny'"
    )
    with pytest.raises(BudgetError, match=rf"epsilon {one:.4f} of .* buys 0 of the 2 rounds of run 'tiny': not even"):
        check_affordable(after)


def test_who_cannot_pay_to_the_end_of_the_run_is_told_when_it_joins_and_joins_again(
    policy: Policy, spec: Spec, tmp_path: Path
) -> None:
    """Three rounds, a budget for three, and one that was begun and lost: the last cannot be paid."""
    long = spec.model_copy(update={"run": spec.run.model_copy(update={"rounds": 3})})
    exact = policy.privacy.model_copy(update={"epsilon": epsilon([SPEND] * 3, policy.privacy.delta)})
    with Ledger(tmp_path, "ab") as ledger:
        fresh = outlook(ledger, long, exact, "run")
        ledger.release(ledger.reserve("run", 0, SPEND, budget=exact.epsilon, delta=exact.delta), "sent")
        begun = outlook(ledger, long, exact, "run")
        ledger.reserve("run", 1, SPEND, budget=exact.epsilon, delta=exact.delta)  # and killed
        killed = outlook(ledger, long, exact, "run")
        elsewhere = outlook(ledger, long, exact, "another")

    assert [(each.affordable, each.done, each.short) for each in (fresh, begun, killed, elsewhere)] == [
        (3, 0, 0),
        (2, 1, 0),
        (1, 1, 1),
        (1, 0, 2),
    ]
    assert fresh.warning is begun.warning is None
    assert str(killed).endswith("the rest buys 1 of the 2 rounds that are left of run 'tiny'")
    assert killed.warning is not None
    assert killed.warning.startswith(
        "1 of the rounds that are left cannot be paid, so this client leaves before the end"
    )


def test_a_round_costs_what_the_run_says(spec: Spec) -> None:
    assert training_spend(spec) == SPEND
    silent = spec.model_copy(update={"privacy": spec.privacy.model_copy(update={"noise_multiplier": None})})
    with pytest.raises(PolicyError, match="needs a noise multiplier"):
        training_spend(silent)


def test_rounds_are_composed_and_neither_forgotten_nor_added_up(tmp_path: Path) -> None:
    """The FedSVD paper's MNLI client over 1,000 steps, whose epsilon is 5.99 by Opacus' numerical composition."""
    each = Spend(1 / 512, 0.46, 200)
    with Ledger(tmp_path, "ab") as ledger:
        for round in range(5):
            ledger.release(ledger.reserve("run", round, each, budget=6.0, delta=1e-5), "sent")
        spent, alone = ledger.epsilon(1e-5), epsilon([each], 1e-5)
        with pytest.raises(BudgetError, match="round 6 of run 'run' would bring epsilon to"):
            ledger.reserve("run", 5, each, budget=6.0, delta=1e-5)

    assert spent == epsilon([Spend(1 / 512, 0.46, 1000)], 1e-5) == pytest.approx(5.9946, abs=5e-3)
    assert alone < spent - 1 < 5 * alone - 1


def test_a_statement_says_what_is_promised_and_by_which_charges(tmp_path: Path) -> None:
    with Ledger(tmp_path, "ab") as ledger:
        ledger.release(ledger.reserve("run", 0, SPEND, budget=50, delta=1e-5), "d" * 64)
        ledger.reserve("run", 1, SPEND, budget=50, delta=1e-5)
        document = json.loads(json.dumps(statement(ledger, 6.0, 1e-5)))
        head, account = ledger.head, ledger.account

    charges = document.pop("charges")
    assert document == {
        "format": "fedloom privacy statement 1",
        "account": account,
        "unit": "one example",
        "adjacency": "add or remove one",
        "delta": 1e-5,
        "epsilon": epsilon([SPEND, SPEND], 1e-5, REPORT_GRID),
        "budget": 6.0,
        "accountant": {"kind": "PLD", "library": "dp-accounting", "version": version("dp-accounting")},
        "grid": REPORT_GRID,
        "sampling": document["sampling"],
        "mechanisms": [{"sampling_rate": 0.3, "noise_multiplier": 1.0, "steps": 6}],
        "entries": 4,
        "head": head,
    }
    assert [(c["charge"], c["run"], c["round"], c["sampling_rate"], c["steps"], c["released"]) for c in charges] == [
        (2, "run", 0, 0.3, 3, "d" * 64),
        (4, "run", 1, 0.3, 3, None),
    ]


def test_a_statement_says_the_grid_that_its_figure_was_computed_on(tmp_path: Path) -> None:
    """Where the loss spreads too far for the finest grid a coarser one is used."""
    loud = Spend(1.0, 0.2, 1)
    with Ledger(tmp_path, "ab") as ledger:
        ledger.reserve("run", 0, loud, budget=1e9, delta=1e-5)
        document = statement(ledger, 1e9, 1e-5)

    assert document["grid"] == terms([loud], 1e-5).grid > REPORT_GRID
    assert document["epsilon"] == epsilon([loud], 1e-5, REPORT_GRID)


def test_what_is_left_of_a_run_is_counted_with_the_evaluations_that_are_due(
    policy: Policy, spec: Spec, tmp_path: Path
) -> None:
    """The first of two evaluations is behind a client that was killed in its third round; only one more is due."""
    scored = FederatedEvaluationSection(enabled=True, every=5, noise_multiplier=2.0)
    run = spec.model_copy(update={"federated_evaluation": scored, "run": spec.run.model_copy(update={"rounds": 9})})
    training, scoring = training_spend(run), evaluation_spend(run)
    whole = epsilon([training] * 10 + [scoring] * 2, policy.privacy.delta)
    exact = policy.privacy.model_copy(update={"epsilon": whole * (1 + 1e-9)})
    with Ledger(tmp_path / "ledger", "sha256:" + "0" * 64) as ledger:
        for round in range(3):
            evaluation = scoring if run.federated_evaluation.due(round) else None
            number = ledger.reserve("run", round, training, budget=1e9, delta=1e-5, evaluation=evaluation)
            if round < 2:
                ledger.release(number, "a" * 64)

        standing = outlook(ledger, run, exact, "run")

    assert (standing.done, standing.affordable, standing.short) == (2, 7, 0)
