"""Faults that are no kill at one place: dropout, two coordinators, clocks that jump, a crowd that comes back."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.chaos.driver import Failure, Federation, Node, free_port
from tests.chaos.kills import Result, checked
from tests.chaos.trial import Trial, begun, digest, stepped

__all__ = ["COMPILER", "after", "clock", "dropout", "many", "split_brain"]

COMPILER = shutil.which("cc")
"""Builds the library that moves a process's wall clock; without it that scenario is left out."""

_DAY_NS = 86_400 * 10**9


def after(trial: Trial) -> str:
    """Digest of the state in which an undisturbed run of all clients ends."""
    state = begun(trial)
    for _ in range(trial.rounds):
        state = stepped(state, trial.names)
    return digest(state)


def _until(federation: Federation, what: Callable[[], bool], limit_s: float = 120.0) -> float:
    """Wait; how long it took."""
    start_s = time.monotonic()
    while not what():
        federation.reap()
        if time.monotonic() - start_s > limit_s:
            raise Failure(f"waited in vain for {limit_s} s\n{federation.tails()}")
        time.sleep(0.01)
    return time.monotonic() - start_s


def _lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def dropout(folder: Path, seed: int, needed: int, asked: int, rounds: int, share: float) -> Result:
    """Every client dies in each of its trainings with this chance, and is away until its lease has lapsed.

    The coordinator knows the chance and asks as many as its rule says, which must be `asked`; fewer if fewer are there.

    Raises:
        Failure: The log is not what the survivors alone give; see `oracle.check`.
    """
    rng = random.Random(seed)
    # Those who are away, for some four rounds each, must not make the next cohort small.
    spare = round(asked * share * min(rounds, 5)) + 3
    trial = Trial(
        clients=asked + spare,
        selected=needed,
        dropout_rate=share,
        rounds=rounds,
        needed=needed,
        deadline_s=30.0,
        lease_s=1.5,
        pause_s=0.5,
    )
    places = [f"participant.{place}" for place in ("fetched", "trained", "stored", "released")]

    def fate() -> str:
        trainings = 1
        while rng.random() >= share:
            trainings += 1
        return f"{rng.choice(places)}=crash@{trainings}"

    federation = Federation(trial, folder, {name: [fate() for _ in range(rounds)] for name in trial.names})
    federation.down_s = 2.0
    federation.run(limit_s=300 + 20 * rounds)
    found = checked(federation)
    sizes = [each["first_asked"] for each in found["log"]]
    if max(sizes) != asked:
        raise Failure(f"{max(sizes)} clients were asked for {needed} updates, not {asked}")
    full = [each for each in found["log"] if each["first_asked"] == asked]
    folded = sum(len(each["folded"]) for each in found["log"])
    return {
        "seed": seed,
        "rounds": rounds,
        "needed": needed,
        "asked": sum(sizes),
        "full_cohorts": len(full),
        "full_opened_again": sum(each["openings"] > 1 for each in full),
        "answered": folded,
        "kills": sum(federation.restarts.values()),
        "opened_again": sum(each["openings"] - 1 for each in found["log"]),
        "reasons": sorted({each["reason"] for each in found["log"]}),
    }


def split_brain(folder: Path) -> Result:
    """The coordinator stands still, another is started on its state, and the first one goes on.

    As long as the first lives the second is refused. Then its lock is taken away, as on a disk whose locks do not
    reach across machines: the second goes on, and what still reaches the first must change nothing.
    """
    federation = Federation(Trial(rounds=4, pause_s=0.3), folder)
    nodes = federation.nodes
    old = nodes["server"]
    try:
        for node in nodes.values():
            federation.start(node)
        _until(federation, lambda: len(_lines(folder / "c2" / "drawn.log")) == 2)
        for node in (nodes["c2"], old):
            os.kill(node.pid, signal.SIGSTOP)
        refused_s = _refused(federation)
        (folder / "state" / "lock").unlink()
        federation.start(nodes["server"])
        _until(federation, lambda: len(_lines(folder / "ready.log")) == 2)
        _moved(federation, nodes["c0"], nodes["c1"])
        for node in (nodes["c2"], old):  # its update goes to the old one
            os.kill(node.pid, signal.SIGCONT)
        old.status = _ended(old.pid)
        if old.status != 1 or "another coordinator has opened" not in (folder / "server.log").read_text():
            raise Failure(f"the old coordinator ended with {old.status}, not fenced off\n{federation.tails()}")
        federation.kill(nodes["c2"])
        while not federation.over():
            time.sleep(0.01)
    finally:
        federation.end()
        if old.running:
            os.kill(old.pid, signal.SIGKILL)
    found = checked(federation)
    if found["state"] != after(federation.trial):
        raise Failure("two coordinators came to something else than one")
    return {"refused_s": round(refused_s, 2)}


def _refused(federation: Federation) -> float:
    """Start a second coordinator beside the first; how long until it has given up."""
    federation.address = f"127.0.0.1:{free_port()}"
    second = federation.nodes["server"] = Node("server")
    federation.start(second)
    taken_s = _until(federation, lambda: not second.running)
    if second.status != 1 or "in use by another coordinator" not in (federation.folder / "server.log").read_text():
        raise Failure(f"a second coordinator was not refused\n{federation.tails()}")
    return taken_s


def _moved(federation: Federation, *clients: Node) -> None:
    """Start these clients again, at the new address."""
    for client in clients:
        federation.kill(client)
    _until(federation, lambda: not any(client.running for client in clients))
    for client in clients:
        federation.start(client)


def _ended(pid: int) -> int:
    end_s = time.monotonic() + 120
    while time.monotonic() < end_s:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise Failure("the old coordinator goes on beside the new one")


def clock(folder: Path, who: str, seed: int) -> Result:
    """The wall clock of the coordinator, the clients or all jumps by up to a day, to and fro, several times a round."""
    rng = random.Random(seed)
    trial = Trial(rounds=5, deadline_s=30.0, lease_s=10.0, pause_s=0.2)
    shift, library = folder.with_suffix(".clock"), folder.with_suffix(".so")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shift.write_bytes(bytes(8))
    source = Path(__file__).with_name("clock.c")
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    faked = {"LD_PRELOAD": str(library), "FEDLOOM_CLOCK": str(shift)}
    federation = Federation(trial, folder)
    jumping = {name for name in federation.nodes if who in ("all", "server" if name == "server" else "clients")}
    federation.environments = dict.fromkeys(jumping, faked)
    next_s, jumps = [0.0], [0]

    def jump() -> None:
        if time.monotonic() >= next_s[0]:
            with shift.open("r+b") as file:
                file.write(rng.randint(-_DAY_NS, _DAY_NS).to_bytes(8, sys.byteorder, signed=True))
            jumps[0] += 1
            next_s[0] = time.monotonic() + 0.1

    federation.run(jump)
    found = checked(federation)
    if found["state"] != after(trial) or sum(federation.restarts.values()) or found["lost"]:
        raise Failure("a clock decided something")
    server = (folder / "server.log").read_text()
    if "server" in jumping and len({line[:10] for line in server.splitlines()}) < 2:
        raise Failure("the coordinator's clock stood where it was")
    if jumps[0] < trial.rounds:
        raise Failure(f"only {jumps[0]} jumps in {trial.rounds} rounds")
    return {"who": who, "jumps": jumps[0], "seed": seed}


def many(folder: Path, clients: int, processes: int) -> Result:
    """A coordinator with many clients is killed and started again; when it serves, and when the last is back.

    Raises:
        Failure: The run does not come to what it would undisturbed.
    """
    trial = replace(Trial(), clients=clients, crowd=processes, private=False, rounds=2, pause_s=0.0, linger_s=10.0)
    federation = Federation(trial, folder)
    joined = [folder / name / "joined.log" for name in trial.nodes]
    trained = folder / trial.nodes[0] / "drawn.log"
    killed_s: list[float] = []

    def strike() -> None:
        if not killed_s and trained.exists():  # the first round is under way
            killed_s.append(time.time())
            federation.kill(federation.server)

    federation.run(strike, limit_s=900)
    found = checked(federation)
    if found["state"] != after(trial):
        raise Failure("a crowd came to something else than undisturbed")
    back: dict[str, float] = {}
    for path in joined:
        for epoch, at_s, name in _lines(path):
            if int(epoch) == 2:
                back.setdefault(name, float(at_s))
    if set(back) != set(trial.names):
        raise Failure(f"{len(back)} of {clients} clients came back")
    ready = next(float(at_s) for epoch, at_s in _lines(folder / "ready.log") if int(epoch) == 2)
    return {
        "clients": clients,
        "serving_s": round(ready - killed_s[0], 2),
        "all_back_s": round(max(back.values()) - killed_s[0], 2),
    }
