"""`fedloom merge`: one adapter of several finished ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedloom.cli.console import Json, out, print_json
from fedloom.cli.server.merge_atlas import learned_on_rows
from fedloom.cli.server.merge_scores import chosen_by_score
from fedloom.core.errors import ConfigError
from fedloom.core.peft_settings import PREFIX

if TYPE_CHECKING:
    from fedloom.strategies.merging.merge import Merged, Rank
    from fedloom.strategies.merging.peft_folder import PeftFolder

__all__ = ["merge"]

_BY_ROWS = {"greedy-soup": ("run", "score-on"), "atlas": ("run", "rows", "steps", "learning-rate")}
"""Methods that look at rows, and the options that they alone take."""


def merge(
    adapters: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of PEFT LoRA adapters of one base model, run folders, or rounds of a run as runs/NAME@8."
        ),
    ],
    target: Annotated[Path, typer.Option("--out", help="Folder for the merged adapter; an earlier one is replaced.")],
    method: Annotated[
        str,
        typer.Option(help="soup, greedy-soup, task-arithmetic, ties, dare, breadcrumbs, lines or atlas."),
    ] = "soup",
    weights: Annotated[
        str | None, typer.Option(help="One number for each adapter, with commas: 2,1,1. All 1 if not given.")
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            help='Rank of the result, or "exact" for as much as it takes; the sum of the adapters\' ranks at most if '
            "not given."
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Take the least rank at which each layer keeps this share of its energy, such as 0.99."),
    ] = None,
    scaling: Annotated[
        float | None, typer.Option(help="Factor of the sum; for ties, of the mean. Not for soup and lines.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of the entries that ties or dare keeps.")] = None,
    smallest: Annotated[float | None, typer.Option(help="Share of small entries that breadcrumbs leaves out.")] = None,
    largest: Annotated[float | None, typer.Option(help="Share of large entries that breadcrumbs leaves out.")] = None,
    slope: Annotated[float | None, typer.Option(help="How much more lines adds in the last block.")] = None,
    seed: Annotated[int | None, typer.Option(help="Which entries dare drops.")] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Run file by which greedy-soup scores and atlas learns: base model, task and data."),
    ] = None,
    score_on: Annotated[
        str | None,
        typer.Option(
            help="Held-out rows for greedy-soup: a file, a folder or a packaged data set; data.source of the "
            "run file if not given."
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(help="Rows that atlas learns from, and that are not private: a file or a packaged data set."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps in which atlas learns; 50 if not given.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of these steps; 0.05 if not given.")] = None,
    json_only: Json = False,
) -> None:
    """Merge finished adapters of one base model into one, by what they add to each weight and not by their factors.

    The result is an ordinary PEFT adapter. Heads and other tensors that an adapter has whole are averaged. A score has
    no noise, and neither has what atlas learns: do not let rows that are private choose an adapter that you give away.

    Example: fedloom merge runs/north/adapter runs/south/adapter --out merged
    """
    from fedloom.cli.server.named_adapter import named_adapter
    from fedloom.strategies.merging.merge_folders import merge_folders, merged_facts
    from fedloom.strategies.merging.methods.named import method_named
    from fedloom.strategies.merging.peft_folder import write_folder

    asked = {"scaling": scaling, "density": density, "smallest": smallest, "largest": largest, "slope": slope}
    options = {name: value for name, value in {**asked, "seed": seed}.items() if value is not None}
    by_rows = method in _BY_ROWS
    chosen, wanted = method_named("soup" if by_rows else method, options), _rank(rank, energy)
    _check(
        method,
        {
            "weights": weights,
            "run": run,
            "score-on": score_on,
            "rows": rows,
            "steps": steps,
            "learning-rate": learning_rate,
        },
    )
    folders, numbers = [named_adapter(path) for path in adapters], _weights(weights, len(adapters))
    scores: dict[str, Any] = {}
    if method == "atlas":
        chosen, scores = learned_on_rows(folders, run, rows, steps, learning_rate)
    elif method == "greedy-soup":
        found = chosen_by_score(folders, wanted, run, score_on)
        numbers = [float(index in found.chosen) for index in range(len(folders))]
        scores = {"scores": list(found.alone), "score": found.score}
    merged = merge_folders(folders, chosen, numbers, wanted)
    facts = merged_facts(target.resolve().name, folders, {"method": method, "options": options, **scores}, numbers)
    write_folder(target, merged.adapter, folders[0], facts, len(folders))
    document = _document(target, merged, folders, facts)
    if json_only:
        print_json(document)
    else:
        _show(document, [each.adapter.rank for each in folders], merged)


def _check(method: str, given: Mapping[str, Any]) -> None:
    """Refuse options that would do nothing."""
    if method in _BY_ROWS and given["weights"] is not None:
        raise ConfigError(f"{method} finds out by rows what each adapter counts; leave out --weights, or take soup")
    taken = {"weights", *_BY_ROWS.get(method, ())}
    if odd := [name for name, value in given.items() if value is not None and name not in taken]:
        having = [each for each, names in _BY_ROWS.items() if odd[0] in names]
        raise ConfigError(f"{method} takes no --{odd[0]}; leave it out, or take {' or '.join(having)}")


def _rank(rank: str | None, energy: float | None) -> "Rank | None":
    from fedloom.strategies.merging.merge import Rank

    if rank is None and energy is None:
        return None
    try:
        most = None if rank in (None, "exact") else int(rank)
    except ValueError:
        raise ConfigError(f'rank is {rank!r}; an integer from 1 up, or "exact", is needed') from None
    if rank == "exact" and energy is not None:
        raise ConfigError("--rank exact and --energy were given; leave one of them out")
    return Rank(most, 1.0 if energy is None else energy)


def _weights(text: str | None, adapters: int) -> list[float]:
    if text is None:
        return [1.0] * adapters
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise ConfigError(f"weights are {text!r}; give numbers with commas between them, such as 2,1,1") from None


def _document(target: Path, merged: "Merged", folders: Sequence["PeftFolder"], facts: dict[str, Any]) -> dict[str, Any]:
    """What was done, for programs."""
    adapter, scale = merged.adapter, folders[0].scale
    return {
        "path": str(target),
        **facts["merged"],
        "rank": adapter.rank,
        "alpha": scale * adapter.rank,
        "relative_error": merged.error,
        "energy_lost": merged.error**2,
        "layers": [
            {"module": each.module, "rank": each.rank, "norm": each.norm, "relative_error": each.error}
            for each in merged.layers
        ],
        "averaged": list(adapter.whole),
        "privacy": facts["privacy"],
    }


def _show(document: dict[str, Any], ranks: list[int], merged: "Merged") -> None:
    scores = document.get("scores")
    table = Table("adapter", "weight", "rank", "epsilon", *(["accuracy"] if scores else []), box=None, pad_edge=False)
    for index, (each, rank) in enumerate(zip(document["adapters"], ranks, strict=True)):
        shown = [f"{scores[index]:.1%}"] if scores else []
        table.add_row(str(each["adapter"]), f"{each['weight']:g}", str(rank), _epsilon(each["privacy"]), *shown)
    joint = _epsilon(document["privacy"]) + (", for an example in all of them" if document["privacy"] else "")
    shown = [f"{document['score']:.1%}"] if scores else []
    table.add_row(document["method"], "", str(document["rank"]), joint, *shown)
    out.print(table)
    if merged.layers:
        worst = max(merged.layers, key=lambda each: each.error)
        out.print(f"\nlayers   {len(merged.layers)}, of rank {document['rank']} with alpha {document['alpha']:g}")
        out.print(
            f"lost     {document['energy_lost']:.2%} of the energy at this rank, a relative error of "
            f"{document['relative_error']:.2g}; most in "
            f"{worst.module.removeprefix(PREFIX)}, {worst.error:.2g}"
        )
    if document["averaged"]:
        out.print(f"averaged {', '.join(each.removeprefix(PREFIX) for each in document['averaged'])}")
    if learned := document.get("coefficients"):
        counted = [[each[index] for each in learned.values()] for index in range(len(ranks))]
        said = (f"{min(each):.2f} to {max(each):.2f}" for each in counted)
        rows = document["rows"]
        out.print(
            f"counting {', '.join(said)} over the layers, learned on {rows['examples']:,} rows of {rows['source']}"
        )
        out.print(f"loss     {rows['loss']:.3f} on these rows, {rows['loss_before']:.3f} at equal parts")
        out.print("         no privacy statement covers these rows")
    out.print(f"adapter  {document['path']}")


def _epsilon(stated: Any) -> str:
    """What a statement in a fedloom.json promises, which anybody may have written."""
    found = [stated.get(key) for key in ("epsilon", "delta")] if isinstance(stated, dict) else []
    if not found or not all(isinstance(each, int | float) for each in found):
        return "none promised"
    return f"{found[0]:.4g} at delta {found[1]:.4g}"
