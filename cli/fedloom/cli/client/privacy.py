"""`fedloom privacy`: what a run will cost, before anybody trains."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedloom.cli.console import Json, out, print_json, terms
from fedloom.core.config.parsing import read_json
from fedloom.core.config.run import RunConfig, load_run
from fedloom.core.errors import ConfigError
from fedloom.core.privacy.accounting import GRID, Adjacency, Spend, epsilon, statement
from fedloom.core.privacy.accounting import calibrate as least_noise
from fedloom.core.privacy.banded import MAX_BANDS, check_bands, participation
from fedloom.core.privacy.spends import evaluations, run_spends, training_spend

if TYPE_CHECKING:
    from fedloom.client.policy import Policy

__all__ = ["app", "calibrate", "plan", "table"]

app = typer.Typer(help="What a run will cost in privacy, before anybody trains.", no_args_is_help=True)

Delta = Annotated[float, typer.Option(help="Delta; it must lie below one over the number of examples.")]
Rate = Annotated[float, typer.Option(help="Poisson sampling rate of a step, in (0, 1].")]
Steps = Annotated[int, typer.Option(help="Steps of a client in one round.", min=1)]
Bands = Annotated[
    int, typer.Option(help="Noise bands of a round: privacy.noise_bands of the run file.", min=1, max=MAX_BANDS)
]
Spent = Annotated[
    Path | None,
    typer.Option(help="What the data have spent already: a JSON statement, such as an adapter's fedloom.json."),
]

_NOISE = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
_ROUNDS = (1, 10, 30, 100, 300)


@app.command()
def calibrate(
    target: Annotated[float, typer.Option("--epsilon", help="Epsilon that all rounds together may cost.")],
    rate: Rate,
    steps: Steps,
    rounds: Annotated[int, typer.Option(help="Rounds that a client joins at most.", min=1)],
    delta: Delta = 1e-5,
    bands: Bands = 1,
    spent: Spent = None,
    json_only: Json = False,
) -> None:
    """Find the least noise multiplier with which a run stays within epsilon.

    It is the one that a coordinator would choose, by the accountant that every client's ledger uses. With --spent,
    epsilon is a budget for what was spent before and this run together.

    Example: fedloom privacy calibrate --epsilon 6 --rate 0.02 --steps 10 --rounds 10
    """
    prior = _spent(spent)
    rate, steps = _participation(bands, rate, steps)
    noise = least_noise(target, delta, rate, steps * rounds, prior=prior)
    each = Spend(rate, noise, steps)
    stated = statement([each] * rounds, delta, GRID)
    before, after = epsilon(prior, delta), epsilon([*prior, *[each] * rounds], delta)
    if json_only:
        figures = {"noise_multiplier": noise, "epsilon_before": before, "epsilon_after": after}
        print_json({**figures, "privacy": stated.document()})
        return
    out.print(f"noise multiplier [bold]{noise:g}[/]", markup=True)
    out.print(f"epsilon {stated.epsilon:.4f} for a client that joins all {rounds:,} rounds")
    if prior:
        out.print(f"epsilon {before:.4f} was spent before; {after:.4f} of {target:g} will be")
    out.print(terms(stated))


@app.command()
def table(
    rate: Rate,
    steps: Steps,
    noise: Annotated[list[float] | None, typer.Option(help="Noise multiplier of a row; 0.5 to 5 if not given.")] = None,
    rounds: Annotated[
        list[int] | None, typer.Option(help="Rounds joined, of a column; 1 to 300 if not given.", min=1)
    ] = None,
    delta: Delta = 1e-5,
    bands: Bands = 1,
    spent: Spent = None,
    json_only: Json = False,
) -> None:
    """Show what epsilon would be: noise multipliers down, rounds joined across.

    Example: fedloom privacy table --rate 0.02 --steps 10 --noise 0.8 --noise 1.2 --rounds 10 --rounds 100
    """
    prior = _spent(spent)
    rows, columns = noise or list(_NOISE), rounds or list(_ROUNDS)
    charged, turns = _participation(bands, rate, steps)
    figures = [[epsilon([*prior, Spend(charged, sigma, turns * count)], delta) for count in columns] for sigma in rows]
    if json_only:
        document = {"noise_multipliers": rows, "rounds": columns, "epsilon": [_finite(row) for row in figures]}
        print_json({**document, "sampling_rate": rate, "steps": steps, "noise_bands": bands, **_account(delta)})
        return
    shown = Table("noise", *(f"{count:,} round{'s' * (count > 1)}" for count in columns), box=None, pad_edge=False)
    for sigma, row in zip(rows, figures, strict=True):
        shown.add_row(f"{sigma:g}", *(f"{value:.3f}" for value in row))
    over = f", {bands} noise bands" if bands > 1 else ""
    out.print(f"epsilon at delta {delta:g}, rate {rate:g}, {steps:,} steps a round{over}")
    out.print(shown)
    out.print("for one example, by adding or removing it; smaller is more private, and 0 is no information at all")


@app.command()
def plan(
    run: Annotated[Path, typer.Argument(help="The run file.")],
    policy: Annotated[
        Path | None,
        typer.Option(help="A site's policy file: its budget, its number of examples, and what its ledger has charged."),
    ] = None,
    spent: Spent = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key, such as run.rounds=5.")] = None,
    json_only: Json = False,
) -> None:
    """Show what a run file costs a client for the rounds it joins, and whether a site can afford and allow it.

    What the site's ledger has charged counts before the run, and --spent on top of it.

    Columns are the run's delta, ten times and a tenth of it, and the run's delta where neighbouring data sets
    differ by replacing an example: that is what counts against somebody who knows how many examples there are.

    Example: fedloom privacy plan examples/sentiment.toml --set run.rounds=20
    """
    from fedloom.client.policy import check_spec, load_policy
    from fedloom.client.privacy.ledger.account import existing_account
    from fedloom.server.build import calibrated

    config = load_run(run, tuple(overrides or ()))
    if not config.privacy.enabled:
        raise ConfigError(f"{run} is not private; set privacy.enabled = true, or there is nothing to account for")
    site = load_policy(policy) if policy else None
    prior = _spent(spent)
    if site is not None:
        with existing_account(site, beside_client=True) as ledger:
            prior += ledger.spends() if ledger is not None else []
    config = calibrated(config)
    document = {**_outlook(config, site, prior), **_account(config.privacy.delta)}
    if json_only:
        print_json(document)
    else:
        _print_plan(document)
    if site is not None:
        check_spec(site, config.spec)


def _outlook(config: RunConfig, site: "Policy | None", prior: list[Spend]) -> dict[str, Any]:
    """Every figure of a plan."""
    delta, rounds, each, train = config.privacy.delta, config.run.rounds, training_spend(config), config.train
    columns: list[tuple[Adjacency, float]] = [
        ("add or remove one", wide) for wide in (10 * delta, delta, float(f"{delta / 10:.6g}"))
    ]
    columns = [column for column in [*columns, ("replace one", delta)] if column[1] < 1]
    rows = [
        {"rounds": joined, "adjacency": adjacency, "delta": at, "epsilon": _finite([spent])[0]}
        for joined in sorted({1, *(max(1, rounds * tenth // 10) for tenth in range(1, 11))})
        for adjacency, at in columns
        for spent in [epsilon([*prior, *run_spends(config, joined)], at, adjacency=adjacency)]
    ]
    found = {
        "run": config.run.name,
        **{"sampling_rate": train.sampling_rate, "noise_multiplier": each.noise_multiplier, "steps": train.steps},
        **{"noise_bands": config.privacy.noise_bands, "round": asdict(each)},
        **{"rounds": rounds, "evaluations": evaluations(config, rounds)},
        "epsilon_before": epsilon(prior, delta),
        "first_unsafe_examples": _first_unsafe(delta),
        "rows": rows,
    }
    if site is not None:
        from fedloom.client.privacy.ledger.budget import affordable

        mine = site.privacy
        fit = affordable(prior, config, mine)
        found |= {"budget": mine.epsilon, "budget_delta": mine.delta, "rounds_within_budget": fit}
    return found


def _print_plan(found: dict[str, Any]) -> None:
    rows, rounds = found["rows"], found["rounds"]
    out.print(
        f"run {found['run']}: {rounds:,} rounds of {found['steps']:,} steps, rate {found['sampling_rate']:g}, "
        f"noise multiplier {found['noise_multiplier']:g}"
        + (
            f" over {found['noise_bands']} bands: a round costs what {found['round']['steps']:,} steps at rate "
            f"{found['round']['sampling_rate']:g} cost"
            if found["noise_bands"] > 1
            else ""
        )
        + (f"; {found['evaluations']:,} evaluations are counted too" if found["evaluations"] else "")
    )
    heads = [(row["adjacency"], row["delta"]) for row in rows if row["rounds"] == rows[0]["rounds"]]
    shown = Table("joined", *(f"{adjacency},\ndelta {at:g}" for adjacency, at in heads), box=None, pad_edge=False)
    for joined in sorted({row["rounds"] for row in rows}):
        values = [row["epsilon"] for row in rows if row["rounds"] == joined]
        shown.add_row(f"{joined:,}", *("unbounded" if value is None else f"{value:.3f}" for value in values))
    out.print(shown)
    if found["epsilon_before"]:
        out.print(f"with epsilon {found['epsilon_before']:.4f} that was spent before")
    out.print(
        f"delta {found['delta']:g} suits a data set of fewer than {found['first_unsafe_examples']:,} examples; a site "
        "that declares as many or more refuses the run. A tenth of one over the number is a good choice"
    )
    if "budget" in found:
        out.print(
            f"this site's budget of epsilon {found['budget']:g} at delta {found['budget_delta']:g} pays for "
            f"{found['rounds_within_budget']:,} of {rounds:,} rounds"
        )


def _participation(bands: int, rate: float, steps: int) -> tuple[float, int]:
    """Rate and steps that a round is charged as.

    Raises:
        ConfigError: A round of so many steps at this rate has no such bands.
    """
    try:
        check_bands(bands, rate, steps, private=True)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return participation(rate, steps, bands)


def _account(delta: float) -> dict[str, Any]:
    """Terms of figures that are not one statement."""
    stated = statement([], delta, GRID).document()
    return {key: stated[key] for key in ("delta", "unit", "adjacency", "sampling", "accountant", "grid")}


def _finite(values: list[float]) -> list[float | None]:
    """JSON has no infinity; None stands for it."""
    return [value if math.isfinite(value) else None for value in values]


def _first_unsafe(delta: float) -> int:
    """The least number n of examples with delta >= 1/n.

    >>> _first_unsafe(1e-5), _first_unsafe(0.3)
    (100000, 4)
    """
    count = max(1, math.floor(1 / delta) - 1)
    while delta < 1 / count:
        count += 1
    return count


def _spent(path: Path | None) -> list[Spend]:
    """The mechanisms of a statement: the whole file, or its part "privacy".

    Raises:
        ConfigError: The file holds no statement.
    """
    if path is None:
        return []
    document = read_json(path)
    part = document["privacy"] if isinstance(document.get("privacy"), dict) else document
    try:
        return [
            Spend(float(each["sampling_rate"]), float(each["noise_multiplier"]), each["steps"])
            for each in part["mechanisms"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} is no statement of spent privacy ({error!r}); give what `fedloom ledger export` writes or an "
            "adapter's fedloom.json"
        ) from error
