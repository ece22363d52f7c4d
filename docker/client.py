"""A client's container of a simulated federation: take a slot, enrol, and `fedloom client` until the run is over."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fedloom.cli.main import main as fedloom
from fedloom.cli.server.server import prepare
from fedloom.client.transport.enrollment import enrol
from fedloom.client.transport.tls import MEMBER_FILE
from fedloom.core.config.run import load_run
from fedloom.core.errors import FedloomError, Unavailable
from fedloom.core.runtime.durable import write_durably
from fedloom.core.security.certificates import Token
from fedloom.simulation.containers import furnish
from fedloom.simulation.slots import take_seat

__all__ = ["main", "until_over"]

_PAUSE_S = 1.0
_DONE = "done"
_OVER = "over"  # docker/coordinator.py writes it; the client's image does not have that file
_GRACE_S = 60.0
"""Seconds in which a client that has heard the run's end writes its adapter; any other has nobody to hear it from."""


def main() -> None:
    """Run the container."""
    shared, home = Path(os.environ["FEDLOOM_SHARED"]), Path(os.environ["FEDLOOM_HOME"])
    server = os.environ["FEDLOOM_SERVER"]
    while not (shared / "slots.json").exists():
        time.sleep(_PAUSE_S)
    names = json.loads((shared / "slots.json").read_bytes())
    try:
        name = _seat(home, names)
        folder = home / name
        if (folder / _DONE).exists() or (shared / _OVER).exists():
            print(f"{name}: this run is over; remove the volumes to begin another", flush=True)
            return
        run = shared / "run.toml"
        # The coordinator has no torch; whoever has the first slot makes what it needs of the model.
        if name == names[0] and not run.with_suffix(".schema.json").exists():
            prepare(run)
        policy = furnish(load_run(run), name, folder, os.environ.get("FEDLOOM_DEVICE") or "auto")
        _enrol(shared / f"{name}.token", server, folder / "certs", name)
    except FedloomError as error:
        sys.exit(f"error: {error}")
    threading.Thread(target=until_over, args=(shared, name, os._exit), daemon=True).start()
    sys.argv = ["fedloom", "client", "--server", server, "--policy", str(policy)]
    sys.argv += ["--adapter", os.environ["FEDLOOM_ADAPTER"]]
    try:
        fedloom()
    except SystemExit as end:
        if not end.code:
            write_durably(folder / _DONE)
        raise


def until_over(shared: Path, name: str, leave: Callable[[int], object], grace_s: float = _GRACE_S) -> None:
    """End this process, as one that is done, some time after the run is over.

    A client that was killed near the end and started again may find the coordinator gone. It would wait for it for
    minutes, fail, and be started again by the engine, time after time.

    Args:
        shared: Folder that the coordinator writes to.
        name: Whose process this is.
        leave: Ends it with a status.
        grace_s: Seconds from the end that is seen to that of the process.
    """
    while not (shared / _OVER).exists():
        time.sleep(_PAUSE_S)
    time.sleep(grace_s)
    print(f"{name}: the run was over before this client came back; its adapter is the others'", flush=True)
    leave(0)


def _seat(home: Path, names: list[str]) -> str:
    """Wait for a slot."""
    told = False
    while (name := take_seat(home, names, socket.gethostname())) is None:
        if not told:
            print(f"all {len(names)} slots are taken; waiting for one that falls free", flush=True)
            told = True
        time.sleep(_PAUSE_S)
    print(f"{name}: taken by container {socket.gethostname()}", flush=True)
    return name


def _enrol(token: Path, server: str, certs: Path, name: str) -> None:
    """Have a key of its own certified, unless that was done before; waits for the coordinator."""
    told = False
    while not (certs / MEMBER_FILE).exists():
        try:
            enrol(Token.from_text(token.read_text(encoding="ascii")), server, certs)
        except Unavailable as error:
            if not told:
                print(f"{name}: waiting for the coordinator; {error}", flush=True)
                told = True
            time.sleep(_PAUSE_S)
    token.unlink(missing_ok=True)  # used, and good for nothing more


if __name__ == "__main__":
    main()
