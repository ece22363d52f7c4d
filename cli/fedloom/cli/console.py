"""What every command prints with."""

import json
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version as distribution_version
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedloom.core.privacy.accounting import Statement
from fedloom.core.text import clean_lines

if TYPE_CHECKING:
    from fedloom.client.eval.confusion import Confusion

__all__ = [
    "INSECURE",
    "Json",
    "failed",
    "out",
    "pace",
    "print_json",
    "show_classes",
    "size",
    "terms",
    "times",
    "told",
    "version",
]

Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON only.")]


class _Plain(Console):
    """A console on which words are words: a peer's are neither markup nor anything that a terminal obeys."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """What every string that is printed goes through, those in a table too."""
        return super().render_str(clean_lines(text), **options)


out = _Plain()
"""Standard output: results. Markup is for our own words, with `markup=True`."""

INSECURE = "insecure: nothing is encrypted and every name is believed; this machine only"
"""What a command says that was told to do without certificates."""

_err = _Plain(stderr=True)


def failed(error: object) -> None:
    """Say what went wrong, on standard error."""
    _err.print("[bold red]error:[/]", end=" ", markup=True)
    _err.print(str(error))


def size(size_bytes: int) -> str:
    """A size for people, in units of 10⁶ or 10³ bytes.

    >>> size(1234567), size(49_600)
    ('1.2 MB', '50 kB')
    """
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.0f} kB"


def told(score: Mapping[str, float | None]) -> str:
    """What the clients' evaluations say together, for people: every figure with its 95 % interval.

    >>> told({"accuracy": 0.75, "accuracy_margin": 0.031, "loss": 0.5, "loss_margin": 0.06})
    'accuracy 75.0% ± 3.1%, loss 0.500 ± 0.060'
    >>> told({"accuracy": 0.75, "accuracy_margin": 0.031, "loss": None, "loss_margin": None})
    'accuracy 75.0% ± 3.1%, loss lost in noise'
    """
    parts = []
    for name in ("accuracy", "loss", "personalised_accuracy", "personalised_loss"):
        if name not in score:
            continue
        value, margin, digits = score[name], score.get(f"{name}_margin"), ".1%" if name.endswith("accuracy") else ".3f"
        shown = "lost in noise" if value is None else format(value, digits)
        shown += f" ± {format(margin, digits)}" if margin is not None else ""
        parts.append(f"{name.replace('_', ' ')} {shown}")
    return ", ".join(parts)


def pace(total: int, clock: Callable[[], float] = time.monotonic) -> Callable[[int], str]:
    """How long the rest of a run takes at the pace so far, for the end of a line about each round.

    Args:
        total: Rounds of the whole run.
        clock: Seconds, from any beginning.

    Returns:
        A function of the number of rounds that are done; it says nothing until a second round shows the pace.
    """
    seen: list[tuple[int, float]] = []

    def rest(done: int) -> str:
        seen.append((done, clock()))
        (first, began), (_, now) = seen[0], seen[-1]
        if not first < done < total:
            return ""
        left_s = (now - began) / (done - first) * (total - done)
        for unit_s, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
            if left_s >= 2 * unit_s:
                return f", about {left_s / unit_s:.0f} {unit} left"
        return f", about {left_s:.0f} seconds left"

    return rest


def print_json(document: Any) -> None:
    """One line of JSON for programs, on standard output."""
    typer.echo(json.dumps(document))


def times(number: int) -> str:
    """How often, for people.

    >>> times(1), times(3)
    ('once', '3 times')
    """
    return "once" if number == 1 else f"{number} times"


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


def show_classes(confusion: "Confusion", labels: tuple[str, ...]) -> None:
    """Precision, recall and F1 of each class, and a word on those that are never found; nothing without classes."""
    from fedloom.client.eval.confusion import class_scores, missed

    if not confusion or not labels:
        return

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    table = Table("class", "examples", "precision", "recall", "F1", box=None, pad_edge=False)
    for each in class_scores(confusion, labels):
        table.add_row(each.label, f"{each.examples:,}", share(each.precision), share(each.recall), share(each.f1))
    out.print()
    out.print(table)
    if never := missed(confusion, labels):
        out.print("[yellow]never found[/]:", end=" ", markup=True)
        out.print(", ".join(never))
