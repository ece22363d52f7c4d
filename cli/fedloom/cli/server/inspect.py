"""`fedloom inspect`: what an adapter does to each layer, and how alike two adapters are."""

from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedloom.cli.console import Json, out, print_json
from fedloom.core.errors import ConfigError

if TYPE_CHECKING:
    from fedloom.strategies.merging.peft_folder import PeftFolder

__all__ = ["inspect"]

_PREFIX = "base_model.model."


def inspect(
    run: Annotated[Path, typer.Argument(help="A run folder such as runs/NAME, or the folder of a PEFT LoRA adapter.")],
    against: Annotated[
        Path | None, typer.Option(help="Another one of the same base model, such as an earlier round's adapter.")
    ] = None,
    json_only: Json = False,
) -> None:
    """Show what an adapter adds to each layer: norm, singular values, effective rank.

    With --against also how far two adapters point the same way: 1 is the same direction or space, 0 is none in common.
    Nothing of this needs data, the base model or torch.

    Example: fedloom inspect runs/north --against runs/south
    """
    from fedloom.strategies.merging.spectrum import likeness, spectrum

    ours, theirs = _adapter(run), None if against is None else _adapter(against)
    if theirs is not None:
        _check_layers(ours, theirs)
    layers: list[dict[str, Any]] = []
    for module, product in sorted(ours.adapter.products.items()):
        found = spectrum(product)
        layer: dict[str, Any] = {
            "module": module.removeprefix(_PREFIX),
            "norm": found.norm,
            "rank": found.rank,
            "effective_rank": found.effective_rank,
            "singular_values": list(found.values),
        }
        if theirs is not None:
            alike = likeness(product, theirs.adapter.products[module])
            layer |= {"cosine": alike.cosine, "input_overlap": alike.inputs, "output_overlap": alike.outputs}
        layers.append(layer)
    if json_only:
        print_json({"adapter": str(ours.path), "against": str(theirs.path) if theirs else None, "layers": layers})
    else:
        _show(layers)


def _adapter(folder: Path) -> "PeftFolder":
    from fedloom.strategies.merging.peft_folder import read_folder

    inside = folder / "adapter"
    return read_folder(inside if (inside / "adapter_config.json").is_file() else folder)


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
    names = [each["module"] for each in layers]
    common = _shared(names)  # names are long, lines are not
    table = Table("layer", "norm", "largest", "effective rank", *compared.values(), box=None, pad_edge=False)
    for name, each in zip(names, layers, strict=True):
        largest = max(each["singular_values"], default=0.0)
        shown = [f"{each['norm']:.3g}", f"{largest:.3g}", f"{each['effective_rank']:.2f} of {each['rank']}"]
        table.add_row(name.removeprefix(f"{common}."), *shown, *(f"{each[key]:.3f}" for key in compared))
    out.print(table)
    if common:
        out.print(f"layers of {common}")
    if not layers:
        out.print("no layer has a pair: the adapter is of another kind than lora")


def _shared(names: list[str]) -> str:
    """What dotted names begin with in common, without their last parts."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(each[0] for each in takewhile(lambda each: len(set(each)) == 1, parts)) if len(names) > 1 else ""
