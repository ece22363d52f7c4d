"""`fedloom inspect`: what an adapter does to each layer, how alike two adapters are, and what a run's rounds did."""

from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedloom.cli.console import Json, out, print_json
from fedloom.core.errors import ConfigError
from fedloom.core.peft_settings import PREFIX

if TYPE_CHECKING:
    from fedloom.strategies.merging.peft_folder import PeftFolder

__all__ = ["inspect"]


def inspect(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run folder such as runs/NAME, one of its rounds as runs/NAME@8, or a PEFT LoRA adapter."
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(help="Another one of the same base model, such as an earlier round of the run, runs/NAME@4."),
    ] = None,
    intruders: Annotated[
        bool, typer.Option("--intruders", help="Count intruder dimensions; needs the base model and torch.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures too, to a file such as adapter.png.")] = None,
    json_only: Json = False,
) -> None:
    """Show what an adapter adds to each layer: norm, singular values, effective rank.

    With --against also how far two adapters point the same way: 1 is the same direction or space, 0 is none in common.
    Of a run folder whose run file has rounds.keep also what averaging lost in each round, how far apart the clients
    were, what part of it was noise, and how far the adapter turned. All of it is made from the adapter and the updates
    that clients sent: no data.

    Example: fedloom inspect runs/north --against runs/south
    """
    from fedloom.cli.server.inspect_rounds import run_document, show_rounds
    from fedloom.cli.server.named_adapter import named_adapter
    from fedloom.strategies.merging.spectrum import likeness, spectrum

    ours, theirs = named_adapter(run), None if against is None else named_adapter(against)
    if theirs is not None:
        _check_layers(ours, theirs)
    document: dict[str, Any] = {"adapter": str(ours.path), "against": str(theirs.path) if theirs else None}
    layers: list[dict[str, Any]] = []
    for module, product in sorted(ours.adapter.products.items()):
        found = spectrum(product)
        layer: dict[str, Any] = {
            "module": module.removeprefix(PREFIX),
            "norm": found.norm,
            "rank": found.rank,
            "effective_rank": found.effective_rank,
            "singular_values": list(found.values),
        }
        if theirs is not None:
            alike = likeness(product, theirs.adapter.products[module])
            layer |= {"cosine": alike.cosine, "input_overlap": alike.inputs, "output_overlap": alike.outputs}
        layers.append(layer)
    if intruders:
        _count_intruders(ours, layers)
    run_rounds = run_document(run)
    document |= {"layers": layers, **run_rounds}
    if plot is not None:
        from fedloom.cli.server.inspect_plot import draw_inspection

        draw_inspection(document, plot)
    if json_only:
        print_json(document)
        return
    _show(layers)
    common = _shared([each["module"] for each in layers])
    show_rounds(run_rounds, {each["module"]: each["module"].removeprefix(f"{common}.") for each in layers})
    if plot is not None:
        out.print(f"plot     {plot}")


def _count_intruders(ours: "PeftFolder", layers: list[dict[str, Any]]) -> None:
    """Add to each layer how many of its leading directions the base model did not have."""
    from fedloom.client.models.base_weights import base_weights
    from fedloom.strategies.diagnostics.intruders import intruder_dimensions

    known = ours.facts
    if not {"base", "task", "labels"} <= known.keys():
        raise ConfigError(
            f"{ours.path} does not say what its base model is: fedloom.json is missing; leave out --intruders"
        )
    named = {each["module"]: each for each in layers}
    weights = base_weights(known["base"], known.get("base_digest"), known["task"], len(known["labels"]), named)
    for module, weight in weights:
        named[module]["intruders"] = intruder_dimensions(weight, ours.adapter.products[PREFIX + module])


def _check_layers(ours: "PeftFolder", theirs: "PeftFolder") -> None:
    """Refuse adapters of other base models or on other layers; their heads, labels and tasks may differ."""
    from fedloom.strategies.merging.merge_folders import check_base

    check_base(ours, theirs)
    if odd := sorted(ours.adapter.products.keys() ^ theirs.adapter.products.keys()):
        raise ConfigError(
            f"{ours.path} and {theirs.path} are not on the same layers: only one has {odd[0]}; compare adapters with "
            "the same adapter.targets"
        )


def _show(layers: list[dict[str, Any]]) -> None:
    compared = {"cosine": "cosine", "input_overlap": "inputs", "output_overlap": "outputs"}
    compared = {name: title for name, title in compared.items() if layers and name in layers[0]}
    counted = ["intruders"] if layers and "intruders" in layers[0] else []
    names = [each["module"] for each in layers]
    common = _shared(names)  # names are long, lines are not
    table = Table("layer", "norm", "largest", "effective rank", *compared.values(), *counted, box=None, pad_edge=False)
    for name, each in zip(names, layers, strict=True):
        largest = max(each["singular_values"], default=0.0)
        shown = [f"{each['norm']:.3g}", f"{largest:.3g}", f"{each['effective_rank']:.2f} of {each['rank']}"]
        table.add_row(
            name.removeprefix(f"{common}."),
            *shown,
            *(f"{each[key]:.3f}" for key in compared),
            *(str(each[key]) for key in counted),
        )
    out.print(table)
    if common:
        out.print(f"layers of {common}")
    if not layers:
        out.print("no layer has a pair: the adapter is of another kind than lora")


def _shared(names: list[str]) -> str:
    """What dotted names begin with in common, without their last parts."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(each[0] for each in takewhile(lambda each: len(set(each)) == 1, parts)) if len(names) > 1 else ""
