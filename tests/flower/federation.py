"""Real flower-superlink, flower-supernode and flwr processes on the loopback interface, for a test or a benchmark."""

import csv
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import tomli_w

ROOT = Path(__file__).parents[2]
"""The working tree. `make setup` gives Flower an environment of its own in it: its pins and ours exclude each other."""

FLOWER = Path(os.environ.get("FEDLOOM_FLOWER_BIN", ROOT / ".venv-flower" / "bin"))
FEDLOOM = f"{sys.executable} -m fedloom.cli.main"
WAIT_S = 400.0


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink and its SuperNodes, all up."""

    folder: Path
    logs: list[Path]

    def run(self, app: Path, out: Path) -> str:
        """`flwr run` to the end; everything that the ServerApp said."""
        command = [str(FLOWER / "flwr"), "run", str(app), "here", "--stream", "--run-config", f'out="{out}"']
        done = subprocess.run(
            command, env=environment(self.folder), capture_output=True, text=True, timeout=WAIT_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def said(self) -> str:
        """What all processes wrote, for whoever has to find out why a run failed."""
        return "\n".join(f"== {log}\n{log.read_text(errors='replace')[-4000:]}" for log in self.logs)


def write_run(folder: Path, base: Path, *, clients: int, rounds: int = 2) -> Path:
    """A run file on a base model, and rated sentences beside it for so many clients; not private, so that it can be
    repeated."""
    data = folder / "data"
    data.mkdir()
    rng = random.Random(0)
    for name, count in (("train", 15 * clients), ("test", 10)):
        with (data / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for _ in range(count):
                label = rng.choice(("negative", "positive"))
                words = [rng.choice(("film", "plot", "actor", "very")) for _ in range(rng.randint(1, 9))]
                writer.writerow([" ".join([{"negative": "awful", "positive": "great"}[label], *words]), label])
    run = folder / "run.toml"
    tables = {
        "run": {"name": "tiny", "rounds": rounds, "seed": 5},
        "model": {"base": str(base), "labels": ["negative", "positive"], "max_length": 16},
        "adapter": {"rank": 4, "alpha": 8},
        "train": {"steps": 3, "sampling_rate": 0.5, "learning_rate": 0.3},
        "privacy": {"enabled": False, "epsilon": 20.0, "delta": 1e-2},
        "strategy": {"name": "fedsvd", "weighting": "examples"},
        "rounds": {"min_clients": clients},
        "data": {"source": str(data), "clients": clients},
        "engine": {"kind": "grpc", "threads": 1},
    }
    run.write_text(tomli_w.dumps(tables))
    return run


def environment(folder: Path) -> dict[str, str]:
    """No telemetry, no look for a newer version, and nothing in the user's home."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(folder / "flwr")}
    search = os.pathsep.join([str(FLOWER), os.environ.get("PATH", "")])
    return {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | quiet | {"PATH": search}


def free_port() -> int:
    """A port that is free now."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def superlink(folder: Path, policies: Mapping[str, Path]) -> Iterator[SuperLink]:
    """A SuperLink, and a SuperNode for each policy; all are gone afterwards."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    home = folder / "flwr"
    home.mkdir(parents=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    )
    with ExitStack() as stack:
        link = SuperLink(folder, [])
        options = [
            "--insecure",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--disable-runtime-dependency-installation",
        ]
        _start(stack, link, "superlink", ["flower-superlink", *options])
        _wait_for(f"http://{address}/health", link)
        for name, policy in policies.items():
            config = f'policy="{policy}" fedloom="{FEDLOOM}"'
            node = ["flower-supernode", "--insecure", "--superlink", address, "--port", str(free_port())]
            _start(stack, link, name, [*node, "--host", "127.0.0.1", "--node-config", config])
        yield link


def _start(stack: ExitStack, link: SuperLink, name: str, command: list[str]) -> None:
    path = link.folder / f"{name}.log"
    log = stack.enter_context(path.open("wb"))
    link.logs.append(path)
    process = subprocess.Popen(
        [str(FLOWER / command[0]), *command[1:]],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment(link.folder),
        cwd=link.folder,
    )
    stack.callback(_stop, process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_for(url: str, link: SuperLink) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert time.monotonic() < deadline, link.said()
            time.sleep(0.2)
