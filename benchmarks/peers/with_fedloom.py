"""fedloom: simulated in one process, or deployed over gRPC.

python -m peers.with_fedloom FOLDER simulation|deployment
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from peers.wire import Traffic, counted
from peers.work import ALPHA, LABELS, RANK, TARGETS, Clock, Work, all_rows, given_work, report, save_final
from safetensors.numpy import load_file

import fedloom.api as fl
from fedloom.client.policy import ComputePolicy
from fedloom.simulation.federation import simulated_policy, write_client
from fedloom.simulation.in_memory import rows_of

FEDLOOM = (sys.executable, "-m", "fedloom.cli.main")


def main() -> None:
    work, how = given_work(), sys.argv[2]
    {"simulation": simulation, "deployment": deployment}[how](work)


def run_of(work: Work) -> fl.Run:
    """The run: FedAvg of everything that is trained, in float32."""
    return fl.Run(
        model=work.model,
        task=fl.TextClassification(labels=list(LABELS), max_length=work.tokens),
        adapter=fl.LoRA(rank=RANK, alpha=ALPHA, targets=list(TARGETS)),
        strategy="fedavg",
        privacy=fl.DP(epsilon=1e4, delta=1e-5, noise_multiplier=1.0) if work.private else None,
        train=fl.Train(steps=work.steps, sampling_rate=1.0, learning_rate=work.rate),
        rounds=work.rounds,
        round_rules=fl.RoundRules(min_clients=work.clients),
        evaluation=fl.Evaluation(every=work.rounds),
        wire=fl.Wire(upload="fp32", broadcast="fp32"),
        engine=fl.Engine(threads=work.cores),
    )


def simulation(work: Work) -> None:
    """`fl.simulate`, one model for all clients."""
    clock = Clock(work)
    rows = all_rows(work.folder)
    data = {f"client-{number:04d}": each for number, each in enumerate(rows)}
    result = fl.simulate(
        run_of(work), data=data, test=rows[0][:2], callbacks=[lambda _: clock.committed()], out=work.path / "runs"
    )
    save_final(work, load_file(result.folder / "adapter" / "adapter_model.safetensors"))
    (up, down) = (int(result.metrics[name].iloc[-1]) for name in ("bytes_up", "bytes_down"))
    report(("fedloom",), clock.read(), bytes_up=up / work.clients, bytes_down=down / work.clients)


def deployment(work: Work) -> None:
    """`fedloom server` and as many `fedloom client`, synced to disk as ever; one proxy counts what they say."""
    clock, run = Clock(work), work.path / "run.toml"
    run_of(work).to_toml(run)
    subprocess.run([*FEDLOOM, "prepare", str(run)], check=True, stdout=subprocess.DEVNULL)
    with ExitStack() as stack:
        lines = stack.enter_context(server(work, run))
        traffic = stack.enter_context(counted(next(address for address in map(listening, lines) if address)))
        clients(work, stack, traffic)
        for line in lines:
            if re.search(r"round \d+/\d+ committed", line):
                clock.committed()
        commits = clock.read()
    save_final(work, load_file(work.path / "adapter" / "adapter_model.safetensors"))
    report(("fedloom", "grpcio"), commits, **traffic.of_a_round(commits, work.clients))


def listening(line: str) -> str:
    """The address in the line that says it."""
    found = re.search(r"listening on (\S+:\d+)", line)
    return found[1] if found else ""


@contextmanager
def server(work: Work, run: Path) -> Iterator[Iterator[str]]:
    """`fedloom server`, and what it says, line by line to its end."""
    command = [*FEDLOOM, "server", str(run), "--insecure-loopback", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        [*command, "--state", str(work.path / "state")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        try:
            yield iter(process.stdout)
        finally:
            process.terminate()


def clients(work: Work, stack: ExitStack, traffic: Traffic) -> None:
    """A process for each client; all are gone when the stack is unwound."""
    config = run_of(work).config
    compute = ComputePolicy(device="cpu", threads=max(1, work.cores // work.clients))
    for number, mine in enumerate(all_rows(work.folder)):
        name = f"client-{number}"
        folder = work.path / "clients" / name
        policy = simulated_policy(name, len(mine), config, work.path, compute)
        path = write_client(policy, rows_of(mine, name, config.model, fl.Form()), folder)
        command = [*FEDLOOM, "client", "--server", traffic.address, "--policy", str(path), "--insecure-loopback"]
        log = stack.enter_context((folder / "log").open("wb"))
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        stack.callback(process.wait, 60)
        stack.callback(process.terminate)


if __name__ == "__main__":
    main()
