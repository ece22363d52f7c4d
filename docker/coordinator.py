"""The coordinator's container of a simulated federation: slots on its first start, then `fedloom server`.

It makes the certificate authority, counts the clients, and puts into the folder it shares with them, in this order:
a join token for each, the run file as it will run, and the list of slots. That list is what clients wait for, and
once it is there nothing is made again. The coordinator itself then waits for the run's schema, which takes torch and
is written by the first client.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tomli_w

from fedloom.cli.main import main as fedloom
from fedloom.core.config.run import RunConfig, load_run
from fedloom.core.errors import ConfigError, FedloomError
from fedloom.core.runtime.durable import make_folder, write_durably
from fedloom.core.security.subject import Identity, MemberRole
from fedloom.server.auth.ca import AUTHORITY_FILE, Authority, create
from fedloom.server.monitoring.dashboard.access import LINKS_FILE, load_tokens, write_links
from fedloom.server.storage.verify import look

__all__ = ["OVER", "SLOTS", "close", "main", "offer", "settled"]

SLOTS = "slots.json"
"""The list of slots, in the shared folder."""
OVER = "over"
"""Written there once the run is over. A client that is started after that finds no coordinator, and need not wait."""

_HOST = "coordinator"
_CLIENTS = "client"
_PORT = 8470
_PAUSE_S = 1.0
_LOOKS = 10
_TOKEN_HOURS = 24.0


def offer(run: Path, overrides: tuple[str, ...], shared: Path, certs: Path, count: Callable[[], int]) -> None:
    """Make authority, tokens, run file and list of slots, unless that was done before.

    Args:
        run: The run file.
        overrides: SECTION.KEY=VALUE for it.
        shared: Folder that clients see.
        certs: Folder of certificates, which they do not see.
        count: Gives the number of clients, which the run keeps.

    Raises:
        ConfigError: The run file is wrong or asks for what containers that are all alike cannot do.
    """
    if (shared / SLOTS).exists():
        return
    config = load_run(run, overrides)
    if config.data is None:
        raise ConfigError(f"{run} has no [data] section, so there is nothing to share out among simulated clients")
    if config.secure_aggregation.enabled:
        raise ConfigError("secure aggregation needs peers that have pinned each other's keys; containers have not")
    clients = count()
    width = len(str(clients - 1))
    names = [f"client-{index:0{width}d}" for index in range(clients)]
    make_folder(shared)
    if not (certs / AUTHORITY_FILE).exists():
        create(certs, [_HOST])
    authority = Authority(certs)
    try:
        for name in names:
            token = authority.invite(Identity(MemberRole.CLIENT, name), _TOKEN_HOURS)
            write_durably(shared / f"{name}.token", token.to_text().encode(), b"\n")
    finally:
        authority.close()
    tables = _sized(config, clients).model_dump(mode="json", exclude_none=True)
    write_durably(shared / "run.toml", tomli_w.dumps(tables).encode())
    write_durably(shared / SLOTS, json.dumps(names).encode())
    print(f"{clients} slots, each with a partition of {config.data.source} and a join token", flush=True)


def _sized(config: RunConfig, clients: int) -> RunConfig:
    """The run for so many clients; rounds wait for all of them at most."""
    assert config.data is not None  # `offer` checks
    data = config.data.model_copy(update={"clients": clients})
    rounds = config.rounds.model_copy(update={"min_clients": min(config.rounds.min_clients, clients)})
    return config.model_copy(update={"data": data, "rounds": rounds})


def settled(look: Callable[[], int], pause: Callable[[], None]) -> int:
    """What `look` gives once it has given the same number above 0 ten times in a row: containers start one by one."""
    seen: list[int] = []
    while len(seen) < _LOOKS or not seen[-1] or len(set(seen[-_LOOKS:])) > 1:
        seen.append(look())
        pause()
    return seen[-1]


def close(shared: Path, state: Path) -> None:
    """Tell clients that are yet to start that the run is over, if it is; one that was only stopped goes on later."""
    try:
        over = look(state).rounds.over(load_run(shared / "run.toml").run.rounds)
    except FedloomError as error:
        print(f"cannot say whether the run is over: {error}", flush=True)
        return
    if over:
        write_durably(shared / OVER)


def _addresses() -> int:
    """The number of client containers: the network's name server knows one address for each."""
    try:
        found = socket.getaddrinfo(_CLIENTS, _PORT, socket.AF_INET, socket.SOCK_STREAM)
    except socket.gaierror:
        return 0
    return len({address for *_, address in found})


def _count() -> int:
    asked = os.environ.get("FEDLOOM_CLIENTS", "")
    if not asked:
        return settled(_addresses, lambda: time.sleep(_PAUSE_S))
    if not asked.isdecimal() or int(asked) < 1:
        raise ConfigError(f"FEDLOOM_CLIENTS = {asked!r}; a number from 1 is allowed, or nothing to count the clients")
    return int(asked)


def main() -> None:
    """Run the container."""
    shared, home = Path(os.environ["FEDLOOM_SHARED"]), Path(os.environ["FEDLOOM_HOME"])
    overrides = tuple(os.environ.get("FEDLOOM_SET", "").split())
    try:
        offer(Path(os.environ["FEDLOOM_RUN"]), overrides, shared, home / "certs", _count)
    except FedloomError as error:
        sys.exit(f"error: {error}")
    while not (shared / "run.schema.json").exists():
        time.sleep(_PAUSE_S)
    command = ["server", str(shared / "run.toml"), "--listen", f"0.0.0.0:{_PORT}"]
    command += ["--certs", str(home / "certs"), "--state", str(home / "state")]
    if address := os.environ.get("FEDLOOM_DASHBOARD"):
        # Known before anybody can look: Prometheus reads the observer's from a file of its own.
        tokens, _ = load_tokens(home / "certs")
        write_durably(home / "observer.token", tokens.observer.encode())
        page = f"http://127.0.0.1:{os.environ.get('DASHBOARD_PORT', '8080')}/"
        write_links(home, page, tokens)
        # What a container prints is kept in its log; the token of whoever may stop the run is not.
        print(f"dashboard at {page}; links with a token: compose exec {_HOST} cat {home / LINKS_FILE}", flush=True)
        command += ["--dashboard", address]
    sys.argv = ["fedloom", *command]
    try:
        fedloom()
    finally:
        close(shared, home / "state")


if __name__ == "__main__":
    main()
