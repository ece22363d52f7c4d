"""What every command prints with."""

from importlib.metadata import version as distribution_version

import typer
from rich.console import Console

__all__ = ["failed", "megabytes", "out", "version"]

out = Console(highlight=False, soft_wrap=True)
"""Standard output: results."""

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


def version(asked: bool) -> None:
    """Print the version and exit when asked to."""
    if asked:
        typer.echo(f"fedloom {distribution_version('fedloom')}")
        raise typer.Exit
