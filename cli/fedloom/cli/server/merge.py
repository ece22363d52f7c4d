"""`fedloom merge`: one adapter of several finished ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedloom.cli.console import Json, out, print_json
from fedloom.cli.server.merge_scores import chosen_by_score
from fedloom.core.errors import ConfigError

if TYPE_CHECKING:
    from fedloom.strategies.merging.merge import Merged, Rank
    from fedloom.strategies.merging.peft_folder import PeftFolder

__all__ = ["merge"]

_PREFIX = "base_model.model."
"""What PEFT puts before every name of the base model."""


def merge(
    adapters: Annotated[
        list[Path], typer.Argument(help="Folders of PEFT LoRA adapters of one base model, such as runs/NAME/adapter.")
    ],
    target: Annotated[Path, typer.Option("--out", help="Folder for the merged adapter; an earlier one is replaced.")],
    method: Annotated[
        str,
        typer.Option(help="soup, greedy-soup, task-arithmetic, ties, dare, breadcrumbs or lines."),
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
        Path | None, typer.Option(help="Run file by which greedy-soup scores: base model, task and data.")
    ] = None,
    score_on: Annotated[
        str | None,
        typer.Option(
            help="Held-out rows for greedy-soup: a file, a folder or a packaged data set; data.source of the "
            "run file if not given."
        ),
    ] = None,
    json_only: Json = False,
) -> None:
    """Merge finished adapters of one base model into one, by what they add to each weight and not by their factors.

    The result is an ordinary PEFT adapter. Heads and other tensors that an adapter has whole are averaged. A score has
    no noise: do not let rows that are private choose an adapter that you give away.

    Example: fedloom merge runs/north/adapter runs/south/adapter --out merged
    """
    from fedloom.strategies.merging.merge_folders import merge_folders, merged_facts
    from fedloom.strategies.merging.methods.named import method_named
    from fedloom.strategies.merging.peft_folder import read_folder, write_folder

    asked = {"scaling": scaling, "density": density, "smallest": smallest, "largest": largest, "slope": slope}
    options = {name: value for name, value in {**asked, "seed": seed}.items() if value is not None}
    greedy = method == "greedy-soup"
    chosen, wanted = method_named("soup" if greedy else method, options), _rank(rank, energy)
    _check(method, weights, run, score_on)
    folders, numbers = [read_folder(path) for path in adapters], _weights(weights, len(adapters))
    scores: dict[str, Any] = {}
    if greedy:
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


def _check(method: str, weights: str | None, run: Path | None, score_on: str | None) -> None:
    """Refuse options that would do nothing."""
    if method == "greedy-soup" and weights is not None:
        raise ConfigError("greedy-soup weighs what it takes alike; leave out --weights, or take soup")
    if method != "greedy-soup" and (run or score_on):
        raise ConfigError(f"{method} scores nothing; leave out --run and --score-on, or take greedy-soup")


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
            f"{worst.module.removeprefix(_PREFIX)}, {worst.error:.2g}"
        )
    if document["averaged"]:
        out.print(f"averaged {', '.join(each.removeprefix(_PREFIX) for each in document['averaged'])}")
    out.print(f"adapter  {document['path']}")


def _epsilon(stated: Any) -> str:
    """What a statement in a fedloom.json promises, which anybody may have written."""
    found = [stated.get(key) for key in ("epsilon", "delta")] if isinstance(stated, dict) else []
    if not found or not all(isinstance(each, int | float) for each in found):
        return "none promised"
    return f"{found[0]:.4g} at delta {found[1]:.4g}"
