"""What every command prints with."""

from importlib.metadata import version as distribution_version

import typer
from rich.console import Console

from fedloom.proto.accounting import Statement

__all__ = ["INSECURE", "failed", "megabytes", "out", "terms", "version"]

out = Console(highlight=False, soft_wrap=True)
"""Standard output: results."""

INSECURE = "insecure: nothing is encrypted and every name is believed; this machine only"
"""What a command says that was told to do without certificates."""

_err = Console(stderr=True, highlight=False, soft_wrap=True)


def failed(error: object) -> None:
    """Say what went wrong, on standard error."""
    _err.print("[bold red]error:[/]", end=" ")
    _err.print(str(error), markup=False)


def megabytes(size_bytes: int) -> str:
    """A size for people, in units of 10⁶ bytes.

    >>> megabytes(1234567)
    '1.2 MB'
    """
    return f"{size_bytes / 1e6:.1f} MB"


def terms(stated: Statement) -> str:
    """What an epsilon means and rests on, in lines for people."""
    done = "; ".join(
        f"{each.steps:,} steps at rate {each.sampling_rate:g} with noise multiplier {each.noise_multiplier:g}"
        for each in stated.mechanisms
    )
    return (
        f"protects {stated.unit} ({stated.adjacency}), over {stated.covers}, at delta {stated.delta:g}\n"
        f"sampled  {done or 'nothing'}\n"
        f"         {stated.sampling}\n"
        f"account  {stated.accountant}, grid {stated.grid:g}"
    )


def version(asked: bool) -> None:
    """Print the version and exit when asked to."""
    if asked:
        typer.echo(f"fedloom {distribution_version('fedloom')}")
        raise typer.Exit
