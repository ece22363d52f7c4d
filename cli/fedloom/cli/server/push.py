"""`fedloom push`: an export to a model hub."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedloom.cli.console import Json, out, print_json, size
from fedloom.core.config.parsing import read_json

__all__ = ["push"]


def push(
    folder: Annotated[Path, typer.Argument(help="What `fedloom export` wrote, or adapter or merged of a run folder.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME of the repository; it is made if there is none.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody read it; it is private otherwise.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    endpoint: Annotated[
        str | None, typer.Option(help="The hub's address; that of HF_ENDPOINT, or the public hub, if not given.")
    ] = None,
    json_only: Json = False,
) -> None:
    """Upload a result to a model hub, after showing what would be uploaded and asking.

    No run does this by itself. Only the files of an export are taken; a folder that holds anything else is refused. Log
    in first with hf auth login. What was uploaded before under another name stays there.

    Example: fedloom push runs/sentiment/adapter clinic/sentiment-adapter
    """
    from fedloom.client.models.exports.hub import push as upload
    from fedloom.client.models.exports.hub import uploadable

    files = uploadable(folder)
    if not json_only:
        _show(files, read_json(folder / "fedloom.json"), repo, public)
    if not yes:
        typer.confirm("Upload?", abort=True, err=True)
    address = upload(files, repo, public=public, endpoint=endpoint)
    if json_only:
        print_json({"commit": address, "repo": repo, "public": public, "files": [path.name for path in files]})
    else:
        out.print(f"uploaded {address}")


def _show(files: list[Path], facts: dict[str, Any], repo: str, public: bool) -> None:
    """What would leave this machine, where to, and what is promised of it."""
    for path in files:
        out.print(f"{size(path.stat().st_size):>9}  {path.name}")
    stated = facts["privacy"]
    if isinstance(stated, dict):
        out.print(f"privacy  epsilon {stated.get('epsilon')} at delta {stated.get('delta')} for {stated.get('unit')}")
    else:
        out.print("privacy  trained without differential privacy: who can read it may learn of single rows")
    out.print(f"to       {repo}, {'which everybody can read' if public else 'private'}")
