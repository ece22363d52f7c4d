"""`fedloom ledger`: the privacy account of a data set."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedloom.cli.console import Json, failed, out, print_json, terms

if TYPE_CHECKING:
    from fedloom.client.policy import Policy
    from fedloom.client.privacy.ledger.hash_chain import Charge
    from fedloom.client.privacy.ledger.ledger import Ledger
    from fedloom.core.privacy.accounting import Spend

__all__ = ["app", "export", "recover", "show", "verify"]

app = typer.Typer(help="The privacy account of a data set, as this client keeps it.", no_args_is_help=True)

PolicyFile = Annotated[Path, typer.Argument(help="The client's policy file.")]

_MOST_ROUNDS = 10_000
"""Where `show` stops to count; more rounds than any run here may have by default."""


@app.command()
def show(
    policy: PolicyFile,
    round: Annotated[
        str | None,
        typer.Option(help="A round as RATE:NOISE:STEPS, to see how many the rest buys; by default the last one's."),
    ] = None,
    json_only: Json = False,
) -> None:
    """Show what has been charged to this client's data, what is left of the budget, and what that buys.

    Example: fedloom ledger show client.toml --round 0.05:1.0:20
    """
    from fedloom.client.policy import load_policy
    from fedloom.client.privacy.ledger.account import existing_account

    site = load_policy(policy)
    with existing_account(site, beside_client=True) as ledger:
        if json_only:
            print_json(None if ledger is None else _document(ledger, site, None if round is None else _spend(round)))
            return
        if ledger is None:
            out.print(f"no account in {site.client.state / 'ledger'}: nothing has been charged")
            return
        _charges(ledger)
        _standing(ledger, site, None if round is None else _spend(round))


@app.command()
def verify(policy: PolicyFile, json_only: Json = False) -> None:
    """Check every entry of the ledger, its anchor, and the updates that wait to be sent; exit status 1 on trouble.

    Example: fedloom ledger verify client.toml
    """
    from fedloom.client.policy import load_policy
    from fedloom.client.privacy.ledger.account import existing_account, outbox_folder
    from fedloom.client.session.outbox import check_outbox
    from fedloom.core.errors import LedgerError

    site = load_policy(policy)
    lines: list[str] = []
    trouble: list[str] = []
    document: dict[str, Any] = {"ledger": None, "waiting": None, "trouble": trouble}
    try:
        with existing_account(site) as ledger:
            if ledger is None:
                lines.append(f"no account in {site.client.state / 'ledger'}, and none is missed")
            else:
                released = sum(charge.digest is not None for charge in ledger.charges())
                lines += [
                    f"{ledger.path}: {ledger.sequence} entries, each follows from the one before; the anchor agrees",
                    f"{len(ledger.charges())} charges, {released} of them released; head {ledger.head}",
                ]
                document["ledger"] = {
                    "path": str(ledger.path),
                    "entries": ledger.sequence,
                    "charges": len(ledger.charges()),
                    "released": released,
                    "head": ledger.head,
                }
    except LedgerError as error:
        trouble.append(str(error))
    try:
        document["waiting"] = len(check_outbox(outbox_folder(site)))
        lines.append(f"{document['waiting']} updates wait to be sent")
    except LedgerError as error:
        trouble.append(str(error))
    if json_only:
        print_json(document)
    else:
        for line in lines:
            out.print(line)
        for line in trouble:
            failed(line)
    if trouble:
        raise typer.Exit(1)


@app.command()
def export(
    policy: PolicyFile,
    output: Annotated[Path | None, typer.Option(help="File to write; standard output by default.")] = None,
) -> None:
    """Write the privacy statement of this client's data as JSON: what was spent, on what terms, by which charges.

    Example: fedloom ledger export client.toml --output statement.json
    """
    from fedloom.client.policy import load_policy
    from fedloom.client.privacy.ledger.account import existing_account
    from fedloom.client.privacy.ledger.statement import statement
    from fedloom.core.errors import LedgerError

    site = load_policy(policy)
    with existing_account(site, beside_client=True) as ledger:
        if ledger is None:
            raise LedgerError(f"no account in {site.client.state / 'ledger'}: there is nothing to state")
        text = json.dumps(statement(ledger, site.privacy.epsilon, site.privacy.delta), indent=2)
    if output is None:
        typer.echo(text)
        return
    output.write_text(text + "\n", encoding="utf-8")
    out.print(f"wrote {output}")


@app.command()
def recover(
    policy: PolicyFile,
    reason: Annotated[str, typer.Option(help="Why; it is kept in the ledger.")],
    spent: Annotated[
        list[str] | None,
        typer.Option(help="RATE:NOISE:STEPS that the ledger does not know of, any number of times; or: nothing."),
    ] = None,
) -> None:
    """Trust a ledger that was moved, restored, damaged or lost, and write down that it was done, and why.

    What the ledger or its anchor knows of stays charged. What neither knows must be declared, as the `mechanisms` of an
    exported statement list it.

    Example: fedloom ledger recover client.toml --reason "moved to the new disk"
    """
    from fedloom.client.policy import load_policy
    from fedloom.client.privacy.ledger.account import anchors_folder, ledger_folder
    from fedloom.client.privacy.ledger.recover import recover as recovered

    site = load_policy(policy)
    declared = None if spent is None else [_spend(each) for each in spent if each != "nothing"]
    done = recovered(ledger_folder(site), anchors_folder(site), reason=reason, spent=declared)
    if done.found:
        out.print(f"found: {done.found}")
    if done.aside is not None:
        out.print(f"the untrusted file is kept as {done.aside}")
    for word, spends in (("restored", done.restored), ("declared", done.declared)):
        for spend in spends:
            figures = f"{spend.steps} steps at rate {spend.sampling_rate:g} and noise {spend.noise_multiplier:g}"
            out.print(f"{word} and charged: {figures}")
    out.print(f"{done.path} is the account's ledger again")


def _spend(text: str) -> "Spend":
    from fedloom.core.errors import ConfigError
    from fedloom.core.privacy.accounting import Spend

    try:
        rate, noise, steps = text.split(":")
        return Spend(float(rate), float(noise), int(steps))
    except ValueError:
        raise ConfigError(f"{text!r} is not RATE:NOISE:STEPS, such as 0.05:1.0:20") from None


def _last_round(charges: "Sequence[Charge]") -> "Spend | None":
    """What the round cost that was charged last; the scoring of a result is no round."""
    return next((each.spend for each in reversed(charges) if not each.result), None)


def _document(ledger: "Ledger", site: "Policy", spend: "Spend | None") -> dict[str, Any]:
    """What `show` prints, for programs; an epsilon that has no bound is null."""
    from fedloom.client.privacy.ledger.budget import rounds_left
    from fedloom.core.privacy.accounting import GRID

    mine, charges = site.privacy, ledger.charges()
    spent = ledger.epsilon(mine.delta)
    spend = spend or _last_round(charges)
    rows = [
        {**asdict(charge.spend), "charge": charge.number, "run": charge.run, "round": charge.round + 1}
        | {
            "released": charge.digest,
            "dropped": charge.dropped,
            "evaluation": charge.evaluation and asdict(charge.evaluation),
            "result": charge.result,
            "noise_bands": charge.noise_bands,
        }
        for charge in charges
    ]
    stated = ledger.statement(mine.delta, GRID)
    return {
        "account": str(ledger.path),
        "charges": rows,
        "budget": mine.epsilon,
        "spent": spent if math.isfinite(spent) else None,
        "left": max(0.0, mine.epsilon - spent),
        "round": asdict(spend) if spend is not None else None,
        "rounds_left": None if spend is None else rounds_left(ledger, spend, mine, _MOST_ROUNDS),
        "privacy": {**stated.document(), "epsilon": stated.epsilon if math.isfinite(stated.epsilon) else None},
    }


def _charges(ledger: "Ledger") -> None:
    """Print every charge."""
    heads = ("charge", "run", "round", "rate", "noise", "steps", "evaluation", "released")
    table = Table(*heads, box=None, pad_edge=False)
    for charge in ledger.charges():
        spend, scored = charge.spend, charge.evaluation
        about = f"noise {scored.noise_multiplier:g}" if scored else ""
        bands = f" ({charge.noise_bands} noise bands)" if charge.noise_bands > 1 else ""
        figures = (f"{spend.sampling_rate:g}", f"{spend.noise_multiplier:g}", f"{spend.steps}{bands}", about)
        released = charge.digest[:12] if charge.digest else charge.dropped or "no"
        number = "result" if charge.result else str(charge.round + 1)
        table.add_row(str(charge.number), charge.run, number, *figures, released)
    out.print(f"account {ledger.path}")
    out.print(table)
    if any(charge.noise_bands > 1 for charge in ledger.charges()):
        out.print("a round with noise bands costs what the steps of one band cost, at so many times the run's rate")


def _standing(ledger: "Ledger", site: "Policy", spend: "Spend | None") -> None:
    """Print what is spent, what is left, and how many rounds of `spend`, or of the last one charged, that buys."""
    from fedloom.client.privacy.ledger.budget import rounds_left
    from fedloom.core.privacy.accounting import GRID

    mine, charges = site.privacy, ledger.charges()
    spent = ledger.epsilon(mine.delta)
    left = max(0.0, mine.epsilon - spent)
    out.print(f"spent epsilon {spent:.4f} of {mine.epsilon:g} at delta {mine.delta:g}; left {left:.4f}")
    spend = spend or _last_round(charges)
    if spend is not None:
        rounds = rounds_left(ledger, spend, mine, _MOST_ROUNDS)
        count = f"{rounds} or more" if rounds == _MOST_ROUNDS else str(rounds)
        out.print(
            f"the rest buys {count} more {'round' if rounds == 1 else 'rounds'} of {spend.steps} steps at rate "
            f"{spend.sampling_rate:g} and noise {spend.noise_multiplier:g}"
        )
    stated = ledger.statement(mine.delta, GRID)
    out.print(terms(stated))
    out.print("a charge counts from the moment it is reserved")
