"""`fedloom ledger` and what `fedloom client` says of the budget, as an operator meets them."""

import json
import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedloom.cli.main import app, main
from fedloom.client.policy import load_policy
from fedloom.client.privacy.ledger.account import anchors_folder, existing_account, ledger_folder, outbox_folder
from fedloom.client.privacy.ledger.anchor import default_anchors
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.outbox import OutboxEntry, keep
from fedloom.core.errors import FedloomError, LedgerError
from fedloom.core.privacy.accounting import REPORT_GRID, Spend, epsilon
from fedloom.proto.messages import UpdateHeader

NAME = "ab" * 16
SPEND = Spend(0.05, 1.5, 20)


def opened(policy: Path) -> Ledger:
    site = load_policy(policy)
    return Ledger(ledger_folder(site), NAME, anchors=anchors_folder(site))


@pytest.fixture
def charged(policy: Path) -> Path:
    with opened(policy) as ledger:
        sent = ledger.reserve("winter", 0, SPEND, budget=3.0, delta=1e-6)
        ledger.release(sent, "cd" * 32)
        ledger.reserve("winter", 1, SPEND, budget=3.0, delta=1e-6)
    return policy


def ledger(*words: str | Path) -> Result:
    done = CliRunner().invoke(app, ["ledger", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def refused(*words: str | Path) -> str:
    with pytest.raises(FedloomError) as error:
        ledger(*words)
    return str(error.value)


@pytest.mark.parametrize("command", ["show", "verify"])
def test_an_empty_ledger_says_so(policy: Path, command: str) -> None:
    done = ledger(command, policy)

    assert done.exit_code == 0
    assert done.stdout.startswith(f"no account in {policy.parent / 'mine' / 'ledger'}")
    assert not (policy.parent / "mine").exists(), "looking must not make an account"


def test_a_charged_ledger_shows_its_charges_what_they_cost_and_what_is_left(charged: Path) -> None:
    done = ledger("show", charged)

    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["2", "winter", "1", "0.05", "1.5", "20", "cd" * 6] in rows
    assert ["4", "winter", "2", "0.05", "1.5", "20", "no"] in rows
    spent = epsilon([SPEND, SPEND], 1e-6)
    assert f"spent epsilon {spent:.4f} of 3 at delta 1e-06; left {3 - spent:.4f}" in done.stdout
    for words in ("one example (add or remove one)", "40 steps at rate 0.05", "Poisson", "PLD", "grid 0.001"):
        assert words in done.stdout
    (more,) = [words for words in rows if words[:3] == ["the", "rest", "buys"]]
    rounds = 2 + int(more[3])
    assert epsilon([Spend(0.05, 1.5, 20 * rounds)], 1e-6) <= 3 < epsilon([Spend(0.05, 1.5, 20 * rounds + 20)], 1e-6)


def test_a_round_with_noise_bands_is_shown_as_such(policy: Path) -> None:
    with opened(policy) as account:
        account.reserve("winter", 0, Spend(0.08, 1.5, 3), budget=3.0, delta=1e-6, noise_bands=4)

    shown = ledger("show", policy).stdout
    assert "3 (4 noise bands)" in shown
    assert "a round with noise bands costs what the steps of one band cost, at so many times the run's rate" in shown
    (charge,) = json.loads(ledger("show", policy, "--json").stdout)["charges"]
    assert (charge["sampling_rate"], charge["steps"], charge["noise_bands"]) == (0.08, 3, 4)
    assert json.loads(ledger("export", policy).stdout)["charges"][0]["noise_bands"] == 4
    assert json.loads(ledger("export", policy).stdout)["epsilon"] == epsilon([Spend(0.08, 1.5, 3)], 1e-6, REPORT_GRID)


def test_show_counts_rounds_of_any_kind(charged: Path) -> None:
    assert (
        "the rest buys 0 more rounds of 9 steps at rate 1 and noise 0.5"
        in ledger(*("show", charged, "--round", "1:0.5:9")).stdout
    )
    for wrong in ("1:2", "x:1:1", "1:1:1.5"):
        assert f"{wrong!r} is not RATE:NOISE:STEPS" in refused("show", charged, "--round", wrong)
    assert "sampling rate 2.0 must lie in (0, 1]" in refused("show", charged, "--round", "2:1:1")


def test_an_account_is_shown_while_its_client_runs_and_is_changed_by_it_alone(charged: Path) -> None:
    with opened(charged) as client:
        before = client.sequence
        shown = ledger("show", charged).stdout
        assert "4  " in shown
        assert "spent epsilon" in shown
        assert len(json.loads(ledger("show", charged, "--json").stdout)["charges"]) == 2

        client.reserve("winter", 2, SPEND, budget=3.0, delta=1e-6)
        assert len(json.loads(ledger("show", charged, "--json").stdout)["charges"]) == 3
        assert client.sequence == before + 1
        site = load_policy(charged)
        with existing_account(site, beside_client=True) as look:
            assert look is not None
            with pytest.raises(LedgerError, match="only looked at"):
                look.reserve("winter", 3, SPEND, budget=3.0, delta=1e-6)
        assert "is in use by another client" in ledger("verify", charged).stderr


def test_verify_says_what_it_found(charged: Path) -> None:
    header = UpdateHeader("a", 0, "f" * 64, "fp32", 4, "0" * 64)
    outbox = outbox_folder(load_policy(charged))

    done = ledger("verify", charged)
    assert done.exit_code == 0
    assert "4 entries, each follows from the one before; the anchor agrees" in done.stdout
    assert "2 charges, 1 of them released" in done.stdout
    assert "0 updates wait to be sent" in done.stdout

    keep(outbox, OutboxEntry("run", 2, header, b"oops", None))  # the digest is not that of the payload
    done = ledger("verify", charged)
    assert done.exit_code == 1
    assert "is damaged" in done.stderr


@pytest.mark.parametrize("gone", ["ledger", "anchor"])
def test_verify_ends_with_status_1_on_trouble_and_adopt_ends_the_trouble(charged: Path, gone: str) -> None:
    with opened(charged) as account:
        path = account.path
    (anchor,) = default_anchors().glob("*.anchor")
    (path if gone == "ledger" else anchor).unlink()

    done = ledger("verify", charged)
    assert done.exit_code == 1
    assert ("is gone" if gone == "ledger" else "its anchor is missing") in done.stderr

    done = ledger("recover", charged, "--reason", "a test", "--spent", "0.1:2:7")
    assert done.exit_code == 0
    assert ("restored and charged: 40 steps at rate 0.05 and noise 1.5" in done.stdout) is (gone == "ledger")
    assert "declared and charged: 7 steps at rate 0.1 and noise 2" in done.stdout
    assert ledger("verify", charged).exit_code == 0
    with opened(charged) as account:
        assert account.epsilon(1e-6) == epsilon([SPEND, SPEND, Spend(0.1, 2.0, 7)], 1e-6)


def test_adopt_takes_the_word_that_nothing_was_spent_but_not_silence(charged: Path) -> None:
    with opened(charged) as account:
        account.path.unlink()
    (anchor,) = default_anchors().glob("*.anchor")
    anchor.unlink()

    assert "declare it with --spent" in refused("recover", charged, "--reason", "new")
    done = ledger("recover", charged, "--reason", "new", "--spent", "nothing")

    assert "there was no ledger" in done.stdout
    assert ledger("verify", charged).exit_code == 0


def test_export_writes_the_statement(charged: Path, tmp_path: Path) -> None:
    output = tmp_path / "statement.json"

    written = ledger("export", charged, "--output", output)
    printed = ledger("export", charged)

    assert written.stdout == f"wrote {output}\n"
    document = json.loads(output.read_text())
    assert document == json.loads(printed.stdout)
    assert document["epsilon"] == epsilon([SPEND, SPEND], 1e-6, REPORT_GRID)
    assert (document["budget"], document["delta"], document["entries"]) == (3.0, 1e-6, 4)


def test_there_is_no_statement_without_an_account(policy: Path) -> None:
    assert "there is nothing to state" in refused("export", policy)


def test_a_refusal_is_one_line_and_status_2(
    policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fedloom", "ledger", "export", str(policy)])
    with pytest.raises(SystemExit) as end:
        main()

    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: no account in")
    logging.getLogger().handlers.clear()  # what `main` set up is not the next test's


def test_a_charge_for_a_runs_result_is_no_round(charged: Path) -> None:
    with opened(charged) as account:
        account.reserve_result("winter", 2, Spend(1.0, 10.0, 1), budget=3.0, delta=1e-6)

    text = ledger("show", charged).stdout

    assert "result" in next(line for line in text.splitlines() if line.split()[4:6] == ["10", "1"])
    assert "more rounds of 20 steps at rate 0.05 and noise 1.5" in text
    document = json.loads(ledger("show", charged, "--json").stdout)
    assert [each["result"] for each in document["charges"]] == [False, False, True]
    assert document["round"]["steps"] == 20
