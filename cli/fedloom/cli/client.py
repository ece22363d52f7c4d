"""`fedloom client`: one data owner's side of a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.console import out

if TYPE_CHECKING:
    from fedloom.client.training import Training
    from fedloom.proto.messages import Joined

__all__ = ["client"]


def client(
    server: Annotated[str, typer.Option(help="Address of the coordinator, HOST:PORT.")],
    policy: Annotated[Path, typer.Option(help="This site's policy file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a policy key, such as client.device=cuda.")
    ] = None,
) -> None:
    """Train on this site's data, within this site's policy, until the run is over.

    The base model is loaded once and stays; the data and the ledger never leave this machine.

    Example: fedloom client --server 127.0.0.1:8470 --policy client.toml
    """
    from fedloom.client.config import load_policy

    site = load_policy(policy, tuple(overrides or ()))
    # Loads torch, which takes seconds: a mistake in the policy file should not have to wait for it.
    import torch

    from fedloom.client.connection import GrpcConnection
    from fedloom.client.participant import Participant
    from fedloom.client.prepare import prepare
    from fedloom.client.privacy.account import spool_folder
    from fedloom.client.privacy.spool import kept

    if site.client.threads:
        torch.set_num_threads(site.client.threads)
    connection = GrpcConnection(server)
    spool, name = spool_folder(site), site.client.name

    def tell(line: str) -> None:
        out.print(f"{name}: {line}", markup=False)

    def ready(joined: "Joined") -> "Training":
        return prepare(site, joined.spec, announce=tell, owing=kept(spool, joined.run, name) is not None)

    participant = Participant(connection, site, ready, spool=spool)
    out.print(f"{participant.name}: joining {server}", markup=False)
    try:
        finished = participant.run()
    finally:
        connection.close()
    out.print(f"{participant.name}: run over after {finished.rounds} rounds; trained {participant.rounds_trained}")
