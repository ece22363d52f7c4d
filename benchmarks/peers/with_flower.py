"""Flower: simulated with an actor for each core, or deployed as a SuperLink with a SuperNode for each client.

python -m peers.with_flower FOLDER simulation|deployment
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from peers.wire import Traffic, counted
from peers.work import Clock, Work, given_work, report

BIN = Path(sys.executable).parent
PROJECT = """[project]
name = "peers"
version = "1.0.0"
description = "The work of benchmarks/peers"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedloom"
fab-include = ["README.md"]

[tool.flwr.app.components]
serverapp = "peers.flower_app:server"
clientapp = "peers.flower_app:client"
"""


def main() -> None:
    work, how = given_work(), sys.argv[2]
    os.environ |= {
        "PEERS_FOLDER": work.folder,
        "FLWR_HOME": str(work.path / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    {"simulation": simulation, "deployment": deployment}[how](work)


def simulation(work: Work) -> None:
    """Ray, one actor for each core; actors and the models in them stay."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from flwr.simulation import run_simulation
    from peers import flower_app

    resources = {"num_cpus": 1, "num_gpus": 0.0}
    config = {"init_args": {"num_cpus": min(work.cores, work.clients)}, "client_resources": resources}
    run_simulation(flower_app.server, flower_app.client, work.clients, backend_config=config)
    report(("flwr", "ray"), Clock(work).read())


def deployment(work: Work) -> None:
    """`flower-superlink`, `flower-supernode` and `flwr run`; one proxy counts what the SuperNodes say."""
    port = free_port()
    app, home = work.path / "app", work.path / "flwr"
    for folder in (app, home):
        folder.mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    (app / "README.md").write_text("# peers\n", encoding="utf-8")
    place = f'address = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(f'[superlink]\ndefault = "here"\n[superlink.here]\n{place}', encoding="utf-8")
    with ExitStack() as stack:
        serve = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        stack.enter_context(started(work, [*serve, "--disable-runtime-dependency-installation"], "superlink"))
        wait_for(f"http://127.0.0.1:{port}/health")
        traffic = stack.enter_context(counted(f"127.0.0.1:{port}"))
        for number in range(work.clients):
            stack.enter_context(started(work, supernode(work, number, traffic), f"supernode-{number}"))
        subprocess.run(["flwr", "run", str(app), "here", "--stream"], check=True, stdout=sys.stderr)
        commits = Clock(work).read()
    report(("flwr",), commits, **traffic.of_a_round(commits, work.clients))


def supernode(work: Work, number: int, traffic: Traffic) -> list[str]:
    """The command for one client's SuperNode."""
    node = ["flower-supernode", "--insecure", "--superlink", traffic.address, "--host", "127.0.0.1"]
    config = f"partition-id={number} num-partitions={work.clients}"
    return [*node, "--port", str(free_port()), "--node-config", config]


@contextmanager
def started(work: Work, command: list[str], name: str) -> Iterator[None]:
    """A process that is gone afterwards."""
    with (work.path / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=work.path)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    """A port that is free now."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str) -> None:
    """Until it answers, for two minutes at most."""
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    main()
