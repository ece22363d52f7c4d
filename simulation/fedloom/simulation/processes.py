"""The gRPC engine: a coordinator on a loopback socket and one `fedloom client` process per client."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from fedloom.client.training.device import shared
from fedloom.core.errors import FedloomError, Unavailable
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.server import serving
from fedloom.simulation.federation import Federation, check_alive, write_client

__all__ = ["CLIENT", "run_processes"]

CLIENT = [sys.executable, "-m", "fedloom.cli.main", "client"]
"""The command that starts one client, before its options."""

_ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Of clients that share a GPU: pieces of their parts that nobody uses grow together again."""

_END_S = 60.0


def run_processes(federation: Federation, coordinator: Coordinator, folder: Path, threads: int) -> Iterator[None]:
    """Run to the end, yielding a few times a second so that the caller can look and evaluate.

    Args:
        federation: Data and policies; each process loads its own base model.
        coordinator: Just made, expecting as many clients as there are.
        folder: Run folder; clients/NAME below it gets each client's files and log.
        threads: Torch threads of each client.

    Raises:
        FedloomError: Client processes failed, or their updates were refused, and the run cannot go on without them.
    """
    with serving(coordinator, "127.0.0.1:0") as address, ExitStack() as stack:
        clients = {
            name: _start(stack, federation, name, folder / "clients" / name, address, threads)
            for name in federation.clients
        }
        while not coordinator.finished:
            yield
            check_alive(federation, coordinator)
            dead = [name for name, process in clients.items() if process.poll() not in (None, 0)]
            if len(clients) - len(dead) < coordinator.progress.needed:
                log = folder / "clients" / dead[0] / "client.log"
                last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                raise FedloomError(
                    f"{len(dead)} of {len(clients)} clients failed; {dead[0]} says: {' '.join(last)} ({log})"
                )
            time.sleep(0.1)
        deadline = time.monotonic() + _END_S
        for name, process in clients.items():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise Unavailable(f"{name} did not end within {_END_S:g} s of the run's end") from None
            yield


def _start(
    stack: ExitStack, federation: Federation, name: str, folder: Path, address: str, threads: int
) -> "subprocess.Popen[bytes]":
    """Start one client; whatever happens, it is gone when the stack is unwound."""
    policy = federation.policies[name]
    # One part of the device is this process's own, which scores the adapters.
    compute = shared(policy.compute.model_copy(update={"threads": threads}), len(federation.clients) + 1)
    path = write_client(policy.model_copy(update={"compute": compute}), federation.clients[name], folder)
    log = stack.enter_context((folder / "client.log").open("wb"))
    # One machine, one user, made-up clients: no certificates.
    command = [*CLIENT, "--server", address, "--policy", str(path), "--insecure-loopback"]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_ALLOCATOR | os.environ)
    stack.callback(_end, process)
    return process


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
