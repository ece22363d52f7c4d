"""A real engine, if one answers, and a federation of containers on it."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASES = ("python:3.11-slim-bookworm", "fedloom-base:bookworm")
CLIENTS = 4
LIMIT_S = 1500.0
SMALL = "run.rounds=3 train.steps=4 train.sampling_rate=0.01 rounds.lease_s=60 rounds.deadline_s=900"


def run(*command: str, check: bool = True, environment: dict[str, str] | None = None) -> str:
    """Standard output of a command."""
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | (environment or {}), check=False
    )
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def missing() -> str:
    """Why no federation of containers can run here; empty if one can."""
    if not os.environ.get("FEDLOOM_COMPOSE"):
        return "builds images and runs containers for some minutes: `make compose-test` does it"
    try:
        run("docker", "info")
        run(*os.environ["FEDLOOM_COMPOSE"].split(), "version")
    except (AssertionError, OSError) as error:
        return f"no Docker engine with compose answers on this machine: {str(error).strip().splitlines()[-1]}"
    return ""


def until(what: str, done: Callable[[], object]) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < end, f"gave up waiting until {what}"
        time.sleep(0.5)


@dataclass
class Containers:
    """One compose project."""

    project: str
    out: Path

    def compose(self, *arguments: str) -> str:
        """Run a compose command."""
        known = [base for base in BASES if run("docker", "images", "--quiet", base)]
        environment = {
            "BASE_IMAGE": os.environ.get("BASE_IMAGE", known[0] if known else BASES[0]),
            "FEDLOOM_OUT": str(self.out),
            "FEDLOOM_SET": SMALL,
            "FEDLOOM_USER": "10001:10001",
            "DASHBOARD_PORT": "0",
        }
        words = os.environ["FEDLOOM_COMPOSE"].split()
        command = (*words, "-p", self.project, "-f", "docker/compose.yaml", *arguments)
        return run(*command, environment=environment)

    def ids(self, service: str = "") -> list[str]:
        """All containers of the project, or of one service, running or not."""
        labels = [f"com.docker.compose.project={self.project}"]
        labels += [f"com.docker.compose.service={service}"] if service else []
        return run("docker", "ps", "--all", "--quiet", *(f"--filter=label={label}" for label in labels)).split()

    def state(self, container: str, field: str) -> str:
        """A field of a container's state."""
        return run("docker", "inspect", "--format", f"{{{{.{field}}}}}", container)

    def look(self, image: str, volume: str, *command: str) -> str:
        """What a command says of a volume, in a container that is no part of the federation."""
        mount = f"{self.project}_{volume}:/var/lib/fedloom"
        return run("docker", "run", "--rm", "--volume", mount, "--entrypoint", command[0], image, *command[1:])

    def slots(self) -> dict[str, str]:
        """Which container has which slot: its name by the container's."""
        holders = self.look("fedloom-client", "clients", "sh", "-c", "grep -H . */holder").splitlines()
        return {holder: path.partition("/")[0] for path, _, holder in (line.partition(":") for line in holders)}

    def standing(self) -> str:
        """What `fedloom runs show` says within the coordinator's container; empty while it is down."""
        (coordinator,) = self.ids("coordinator")
        show = ("fedloom", "runs", "show", "/var/lib/fedloom/state")
        return run("docker", "exec", coordinator, *show, check=False)


@pytest.fixture(scope="session")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """A federation of four clients from fresh volumes, just started."""
    if reason := missing():
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("out")
    out.chmod(0o1777)
    made = Containers(f"fedloom-test-{os.getpid()}", out)
    try:
        made.compose("up", "--detach", "--build", "--scale", f"client={CLIENTS}")
        yield made
    finally:
        print(made.compose("logs", "--no-color"))
        made.compose("down", "--volumes")
