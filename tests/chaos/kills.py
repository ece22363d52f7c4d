"""Kills at every failpoint, in every phase, and at random: what is killed where, and what must come out."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedloom.core.runtime.failpoints import CALLS, LINES
from tests.chaos.driver import Failure, Federation, Node
from tests.chaos.trial import Trial

__all__ = ["POINTS", "PRIMED", "cells", "chain", "chains", "counted", "kill", "side", "storm"]

POINTS = tuple(sorted(CALLS | LINES))
PRIMED = {
    "history.reread": "rpc.submit.taken=crash@1",
    "history.continue": "rpc.submit.taken=crash@1",
    "store.fetch": "rpc.submit.taken=crash@1",
    "participant.left_over": "participant.released=crash@1",
}
"""Failpoints that only a process after a crash reaches, and the crash that comes first."""

_FIRST = ("history.begin", "history.born")
_LAST = ("serve.over", "line.leave", "rpc.leave")
_CLIENT = ("line.", "participant.", "outbox.", "durable.", "ledger.", "anchor.")
_ONCE = frozenset(
    {
        "ledger.open",
        "participant.prepared",
        "serve.bound",
        "serve.ready",
        "serve.tick",
        "store.discard",
        "store.epoch",
        "store.opened",
        "store.read",
    }
)
"""Reached once in a life, or at a pace of their own."""
_SURE = {
    "line.heartbeat": 2,
    "line.join": 1,
    "line.work": 2,
    "participant.join": 1,
    "rpc.heartbeat": 2,
    "rpc.join": 1,
    "rpc.work": 2,
    "serve.tick": 1,
    "store.discard": 2,
}
"""How many of first, middle and last time are sure to come: how often these are reached depends on the machine."""
_NEVER = 10**9

Result = dict[str, Any]


def side(point: str) -> str:
    """The node that has the failpoint; of the clients the first stands for all."""
    return "c0" if point.startswith(_CLIENT) else "server"


def checked(federation: Federation) -> Result:
    """What the oracle says of a trial that is over, and how it went."""
    # Holds failpoints through what it imports, so it comes after the last process of this trial was forked.
    from tests.chaos import oracle

    deaths = {name: node.starts - (node.status == 0) for name, node in federation.nodes.items()}
    found = oracle.check(federation.trial, federation.folder, deaths)
    return found | {"restarts": dict(federation.restarts)}


def kill(trial: Trial, folder: Path, arms: Mapping[str, Sequence[str]], expected: str) -> Result:
    """One trial with failpoints armed; the same must come out as when nothing is.

    Raises:
        Failure: It does not, or a failpoint was not reached.
    """
    federation = Federation(trial, folder, arms)
    federation.run()
    if missed := federation.unreached():
        raise Failure(f"not reached: {missed}")
    found = checked(federation)
    if expected and found["state"] != expected:
        raise Failure(f"{arms} gives {found['state'][:12]}, undisturbed it is {expected[:12]}")
    return found


def counted(trial: Trial, folder: Path) -> Result:
    """An undisturbed trial: its outcome, and how often each failpoint is reached on its node."""
    never = ";".join(f"{point}=crash@{_NEVER}" for point in POINTS)
    federation = Federation(trial, folder, {name: [never] for name in ("server", *trial.names)})
    federation.run()
    hits: dict[str, int] = {}
    for line in (folder / "hits.log").read_text().splitlines():
        name, point, count = line.split()
        if name == side(point):
            hits[point] = int(count)
    return checked(federation) | {"hits": hits}


def cells(hits: Mapping[str, int], *, actions: Sequence[str] = ("crash",)) -> dict[str, dict[str, list[str]]]:
    """The grid, by name: each failpoint at its first, middle and last time, and other actions at the middle one."""
    found: dict[str, dict[str, list[str]]] = {}
    for point in POINTS:
        count = hits.get(point, 0)
        times = sorted({1, (count + 1) // 2, count} - {0}) if point not in PRIMED else [1]
        times = times[: _SURE.get(point, 3)]
        for action in actions:
            if action == "ambiguous" and point in LINES:
                continue
            chosen = times if action == "crash" else [times[len(times) // 2]]
            for nth in chosen:
                armed = [f"{point}={action}@{nth}"]
                if point in PRIMED:
                    armed.insert(0, PRIMED[point])
                found[f"{point}-{action}-{nth}"] = {side(point): armed}
    return found


def chains(seed: int, length: int) -> list[dict[str, list[str]]]:
    """Every failpoint once, several after each other in one trial: each process is killed at the next one."""
    rng = random.Random(seed)
    server = [
        point for point in POINTS if side(point) == "server" and point not in PRIMED and point not in _FIRST + _LAST
    ]
    client = [point for point in POINTS if side(point) == "c0" and point not in PRIMED and point not in _LAST]
    rng.shuffle(server)
    rng.shuffle(client)
    parts = -(-max(len(server), -(-len(client) // 3)) // length)
    found = []
    for part in range(parts):
        arms = {"server": [_armed(point, rng) for point in server[part::parts]]}
        for number in range(3):
            arms[f"c{number}"] = [_armed(point, rng) for point in client[3 * part + number :: 3 * parts]]
        found.append(arms)
    first, last = found[0], found[-1]
    first["server"] = [f"{point}=crash" for point in _FIRST] + first["server"]
    for point, before in PRIMED.items():
        last[side(point)] += [before, f"{point}=crash"]
    first["server"].append("rpc.leave=crash")
    last["server"].append("serve.over=crash")
    last["c1"].append("line.leave=crash")
    return found


def _armed(point: str, rng: random.Random) -> str:
    return f"{point}=crash@{1 if point in _ONCE else rng.choice((1, 2))}"


def chain(folder: Path, arms: Mapping[str, Sequence[str]], expected: Callable[[int], str]) -> Result:
    """One chain, of as many rounds as its kills may need."""
    trial = Trial(rounds=5 + 2 * max(len(texts) for texts in arms.values()))
    return kill(trial, folder, arms, expected(trial.rounds))


def storm(folder: Path, seed: int, kills: int, targets: Sequence[str], expected: str, trial: Trial) -> Result:
    """One trial whose processes are killed at random times, `kills` times if the run lasts so long."""
    rng = random.Random(seed)
    federation = Federation(trial, folder)
    done, next_s = [0], [time.monotonic() + rng.uniform(0.1, 0.6)]

    def strike() -> None:
        if done[0] >= kills or time.monotonic() < next_s[0]:
            return
        node: Node = federation.nodes[rng.choice(tuple(targets))]
        if node.running:
            federation.kill(node)
            done[0] += 1
        next_s[0] = time.monotonic() + rng.uniform(0.02, 0.5)

    federation.run(strike, limit_s=600)
    found = checked(federation)
    if found["state"] != expected:
        raise Failure(f"seed {seed}: {found['state'][:12]}, undisturbed it is {expected[:12]}")
    return found | {"kills": done[0], "seed": seed}


def long(rounds: int) -> Trial:
    """A trial that lasts long enough to be killed in often."""
    return replace(Trial(), rounds=rounds, pause_s=0.05)
