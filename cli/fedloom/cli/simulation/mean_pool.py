"""`fedloom mean-pool`: a base model whose classifier reads the mean of the tokens."""

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.console import Json, out, print_json

__all__ = ["mean_pool"]


def mean_pool(
    base: Annotated[str, typer.Argument(help="A sentence encoder: a folder, or a name of `fedloom assets`.")],
    folder: Annotated[Path, typer.Argument(help="The new base model's folder.")],
    blocks: Annotated[
        int | None, typer.Option(help="Keep its first so many blocks alone: training is faster, and less accurate.")
    ] = None,
    json_only: Json = False,
) -> None:
    """Give a BERT or RoBERTa sentence encoder a block with which a classifier's head reads the mean of the tokens.

    Such encoders are trained through that mean, and a classifier's head reads the first token alone: few private
    rounds then learn little. What is written is an ordinary model of the same kind, for every site to take.

    Example: fedloom mean-pool minilm-l6 minilm-mean --blocks 4
    """
    from fedloom.client.models.base_folder import base_digest, resolve_base
    from fedloom.client.models.mean_pooled import mean_pooled
    from fedloom.core.runtime.export_folder import replace_export

    source = resolve_base(base)
    replace_export(folder, lambda draft: mean_pooled(source, draft, blocks))
    digest = base_digest(folder)
    if json_only:
        print_json({"folder": str(folder), "digest": digest})
        return
    out.print(f"base model in {folder}\n{digest}")
