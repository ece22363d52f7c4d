"""`fedloom identity`: the key by which a client's peers know it."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["identity"]


def identity(policy: Annotated[Path, typer.Argument(help="The client's policy file.")]) -> None:
    """Print this site's public identity key as the line that its peers put under secure_aggregation.peers.

    The key itself is made at first use, in the client's state folder, and stays there. Hand the line to your peers by
    a way that does not lead through the coordinator.

    Example: fedloom identity client.toml
    """
    from fedloom.client.policy import load_policy
    from fedloom.client.secagg.identity_key import load_identity, public_text

    client = load_policy(policy).client
    typer.echo(f'"{client.name}" = "{public_text(load_identity(client.state))}"')
