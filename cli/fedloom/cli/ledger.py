"""`fedloom ledger`: the privacy account of a data set."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fedloom.cli.console import out

if TYPE_CHECKING:
    from fedloom.client.config import PrivacyPolicy
    from fedloom.client.privacy.ledger import Ledger

__all__ = ["app", "show"]

app = typer.Typer(help="The privacy account of a data set, as this client keeps it.", no_args_is_help=True)


@app.command()
def show(policy: Annotated[Path, typer.Argument(help="The client's policy file.")]) -> None:
    """Show what has been charged to each data set of this client, and what is left of the budget.

    Example: fedloom ledger show client.toml
    """
    from fedloom.client.config import load_policy
    from fedloom.client.privacy.ledger import Ledger, stored_accounts

    site = load_policy(policy)
    folder = site.client.state / "ledger"
    digests = stored_accounts(folder)
    for digest in digests:
        with Ledger(folder, digest) as ledger:
            _account(ledger, site.privacy)
    if not digests:
        out.print(f"no account in {folder}: nothing has been charged", markup=False)


def _account(ledger: "Ledger", policy: "PrivacyPolicy") -> None:
    """Print one data set's charges and standing."""
    table = Table("charge", "run", "round", "rate", "noise", "steps", "released", box=None, pad_edge=False)
    for charge in ledger.charges():
        spend = charge.spend
        figures = (f"{spend.sampling_rate:g}", f"{spend.noise_multiplier:g}", str(spend.steps))
        released = charge.digest[:12] if charge.digest else "no"
        table.add_row(str(charge.number), charge.run, str(charge.round + 1), *figures, released)
    out.print(f"account {ledger.path}", markup=False)
    out.print(table)
    out.print(
        f"spent epsilon {ledger.epsilon(policy.delta):.4f} of {policy.epsilon:g} at delta {policy.delta:g}\n"
        "unit one example, adjacency add or remove one, PLD accountant, Poisson sampling; "
        "a charge counts from the moment it is reserved"
    )
