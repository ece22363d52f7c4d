"""`fedloom certs`: who may take part, and how each proves it."""

import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedloom.cli.console import Json, out, print_json
from fedloom.core.errors import ConfigError
from fedloom.core.security.subject import Identity, MemberRole

__all__ = ["SERVER_CERTS", "app", "certs_folder", "enrol", "init", "invite", "list_", "renew", "revoke"]

app = typer.Typer(help="Certificates: who may take part, and how each proves it.", no_args_is_help=True)

SERVER_CERTS = Path("certs")
"""Where a coordinator's certificates lie by default."""

_ROLES = tuple(role for role in MemberRole if role is not MemberRole.INVITE)
Certs = Annotated[Path, typer.Option(help="The coordinator's folder of certificates.")]


@app.command()
def init(
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address by which clients reach the coordinator; may be repeated.")
    ] = None,
    certs: Certs = SERVER_CERTS,
) -> None:
    """Make a certificate authority and the coordinator's own certificate.

    Loopback addresses are always among the coordinator's names. Keep the folder: without it nobody is let in any more.

    Example: fedloom certs init --host fl.example.org
    """
    from fedloom.server.auth.ca import create

    create(certs, host or [])
    out.print(f"authority and coordinator's certificate in {certs}; back it up, and let nobody else read it")


@app.command()
def invite(
    name: Annotated[str, typer.Argument(help="Name of the member; a client's is the one in its policy file.")],
    role: Annotated[str, typer.Option(help="client, operator or observer.")] = "client",
    hours: Annotated[float, typer.Option(help="How long the invite is good.")] = 24.0,
    token: Annotated[
        Path | None, typer.Option("--out", help="File for the join token, readable by you alone; - prints it.")
    ] = None,
    certs: Certs = SERVER_CERTS,
) -> None:
    """Make a join token: one line, good once, for one member. Hand it over by a way that nobody else can read.

    Inviting a member again replaces it: what it had is refused once the new token is used.

    Example: fedloom certs invite hospital-a
    """
    from fedloom.core.runtime.durable import write_durably
    from fedloom.server.auth.ca import Authority

    if role not in _ROLES:
        raise ConfigError(f"role {role!r}; {', '.join(_ROLES)} are allowed")
    authority = Authority(certs)
    try:
        made = authority.invite(Identity(MemberRole(role), name), hours).to_text()
    finally:
        authority.close()
    target = token or Path(f"{name}.token")
    if str(target) == "-":
        typer.echo(made)
        return
    try:
        write_durably(target, made.encode("ascii"), b"\n")
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error}") from error
    out.print(f"join token of {name} in {target}; it is good once, for {hours:g} hours")


@app.command()
def enrol(
    token: Annotated[Path, typer.Argument(help="File with the join token; - reads standard input.")],
    server: Annotated[str, typer.Option(help="Address of the coordinator, HOST:PORT.")],
    policy: Annotated[
        Path | None, typer.Option(help="The client's policy file: certificates go where it will look for them.")
    ] = None,
    certs: Annotated[Path | None, typer.Option(help="Folder for the certificates, if there is no policy file.")] = None,
) -> None:
    """Make a key, have it certified with a join token, and keep both. The key never leaves this machine.

    Cut off, it can be run again.

    Example: fedloom certs enrol hospital-a.token --server fl.example.org:8470 --policy client.toml
    """
    from fedloom.client.transport.enrollment import enrol
    from fedloom.core.security.certificates import Token

    try:
        text = sys.stdin.readline() if str(token) == "-" else token.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the join token from {token}: {error}") from error
    folder = certs_folder(policy, certs)
    found = enrol(Token.from_text(text), server, folder)
    out.print(f"enrolled as {found.role} {found.name}; key and certificate in {folder}")


@app.command("list")
def list_(certs: Certs = SERVER_CERTS, json_only: Json = False) -> None:
    """Show every certificate and invite, and how it stands.

    Example: fedloom certs list
    """
    from fedloom.server.auth.ca import Authority

    authority = Authority(certs)
    try:
        entries = authority.identities.entries()
    finally:
        authority.close()
    if json_only:
        rows = [
            {
                "name": each.identity.name,
                "role": each.promised,
                "state": each.state(time.time()),
                "ends": datetime.fromtimestamp(each.expires_s, UTC).isoformat(),
                "fingerprint": each.fingerprint,
            }
            for each in entries
        ]
        print_json(rows)
        return
    table = Table("name", "role", "state", "ends (UTC)", "fingerprint", box=None, pad_edge=False)
    for entry in entries:
        ends = datetime.fromtimestamp(entry.expires_s, UTC).strftime("%Y-%m-%d %H:%M")
        table.add_row(entry.identity.name, entry.promised, entry.state(time.time()), ends, entry.fingerprint[:16])
    out.print(table)


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="Name of the member.")],
    certs: Certs = SERVER_CERTS,
) -> None:
    """Let a member in no more, from now on. Running coordinators put it out within seconds.

    Example: fedloom certs revoke hospital-a
    """
    from fedloom.server.auth.ca import Authority

    authority = Authority(certs)
    try:
        number = authority.identities.revoke(name)
    finally:
        authority.close()
    out.print(f"{name}: {number} certificates and invites revoked")


@app.command()
def renew(
    server: Annotated[
        str | None, typer.Option(help="Address of the coordinator: renews this member's certificate there.")
    ] = None,
    host: Annotated[
        list[str] | None, typer.Option(help="New names of the coordinator, instead of those it has.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="The client's policy file.")] = None,
    certs: Annotated[Path | None, typer.Option(help="Folder of certificates, if there is no policy file.")] = None,
) -> None:
    """Replace a certificate before it ends: the coordinator's own, or with --server a member's.

    A running coordinator takes up its new certificate by itself. `fedloom client` renews its own while it runs.

    Example: fedloom certs renew
    """
    if server is not None:
        from fedloom.client.transport.enrollment import renew

        folder = certs_folder(policy, certs)
        found = renew(server, folder)
        out.print(f"renewed the certificate of {found.role} {found.name} in {folder}")
        return
    from fedloom.server.auth.ca import Authority

    authority = Authority(certs or SERVER_CERTS)
    try:
        until = authority.renew_server(host or [])
    finally:
        authority.close()
    out.print(f"the coordinator's certificate is good until {until:%Y-%m-%d}")


def certs_folder(policy: Path | None, certs: Path | None) -> Path:
    """A member's folder of certificates: the one given, or the one in its policy's state folder.

    Raises:
        ConfigError: Neither is given, or the policy file is wrong.
    """
    if certs is not None:
        return certs
    if policy is None:
        raise ConfigError("where are the certificates? give the client's policy file with --policy, or --certs FOLDER")
    from fedloom.client.policy import load_policy

    return load_policy(policy).client.state / "certs"
