"""Random lives of a client, each ended at a random point: what left is always in the ledger, and left only once.

A life is the real `Participant` with the real ledger, anchor and outbox; only the training and the coordinator are
made up. `crash` is a kill at any write, or a loss of power that takes with it what was not synced. `sequences` runs
any number; `make prove` has `benchmarks/prove_ledger.py` run 100,000 on all cores.
"""

import hashlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger import ledger as module
from fedloom.client.privacy.ledger.file import add
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.api import CheckCancelled, Trained
from fedloom.client.session.participant import Participant
from fedloom.core.codecs import codec
from fedloom.core.config.run import Spec
from fedloom.core.errors import BudgetError, LedgerError, PolicyError, ProtocolError, Unavailable, UpdateRejected
from fedloom.core.privacy.accounting import Spend, epsilon
from fedloom.core.schema import Role, Schema, Tensors, TensorSpec
from fedloom.proto.messages import Assignment, Joined, RoundStatus, UpdateHeader, Wait

SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (1, 2)),))
BROADCAST = codec("fp32").encode(SCHEMA, SCHEMA.zeros())
DIGEST = hashlib.sha256(BROADCAST).hexdigest()
SPEC = Spec.model_validate(
    {
        "run": {"name": "r", "rounds": 9},
        "model": {"base": "none", "labels": ["a", "b"]},
        "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
        "privacy": {"enabled": False},
    }
)
POLICY = Policy.model_validate(
    {"client": {"name": "a"}, "data": {"source": "none"}, "privacy": {"allow_non_private": True}}
)
SPENDS = (Spend(0.1, 1.0, 5), Spend(0.05, 2.0, 3), Spend(0.1, 1.0, 1))
DELTA = 1e-5


class Crash(BaseException):
    """The process is gone; nothing may catch it."""


@dataclass
class Disk:
    """Stands between the client and its disk: counts the writes, stops at one of them, and forgets as a disk may."""

    fuse: int = 10**9
    """Number of points still to pass before the end."""
    real: bool = False
    """Whether the end is that of a real process."""
    synced: set[int] = field(default_factory=set)
    """Inodes whose content is on the platter."""
    renamed: list[tuple[Path, bytes | None, bool]] = field(default_factory=list)
    """Renames that are not: path, its content before, and whether its new content was synced."""

    def point(self) -> None:
        if self.fuse <= 0:
            if self.real:
                os._exit(7)
            raise Crash
        self.fuse -= 1

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.point()
            result = call(*arguments)
            self.point()
            return result

        return counted

    def fsync(self, handle: int) -> None:
        inode = os.fstat(handle).st_ino
        self.synced.add(inode)
        self.renamed = [each for each in self.renamed if each[0].parent.stat().st_ino != inode]

    def replace(self, source: Path, target: Path) -> None:
        before = target.read_bytes() if target.exists() else None
        inode = source.stat().st_ino
        self.renamed.append((target, before, inode in self.synced))
        self.synced.discard(inode)
        os.rename(source, target)

    def lose_power(self, rng: random.Random) -> None:
        """Undo the renames that were not synced, or let them stand without the content that was not."""
        undone = rng.random() < 0.7
        for path, before, content_synced in reversed(self.renamed):
            if undone and before is None:
                path.unlink()
            elif undone and before is not None:
                path.write_bytes(before)
            elif not content_synced:
                path.write_bytes(b"")


@contextmanager
def standing_between(disk: Disk) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", disk.around(disk.fsync))
        patch.setattr(os, "replace", disk.around(disk.replace))
        patch.setattr(module, "add", disk.around(add))
        yield


@dataclass
class World:
    """What outlives the client: its disk, its coordinator, and what an observer of both has seen."""

    folder: Path
    rng: random.Random
    round: int = 0
    log: list[tuple[Any, ...]] = field(default_factory=list)
    pipe: int | None = None

    def note(self, *event: Any) -> None:
        self.log.append(event)
        if self.pipe is not None:
            os.write(self.pipe, json.dumps(event).encode() + b"\n")

    def move_on(self) -> None:
        self.round += 1
        self.note("round", self.round)

    def ledger(self) -> Ledger:
        return Ledger(self.folder / "ledger", "ab" * 16, anchors=self.folder / "anchors")

    def join(self, client: str, declared_examples: int) -> Joined:
        return Joined("run-1", 1, SPEC, SCHEMA)

    def work(self, held: str = "") -> Assignment | Wait:
        return Assignment(self.round, SCHEMA.roles, SCHEMA.roles, DIGEST, len(BROADCAST))

    def fetch(self, digest: str, size_bytes: int) -> bytes:
        return BROADCAST

    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        self.note("left", header.round, payload.hex())
        fate = self.rng.random()
        if fate < 0.2:
            raise Unavailable("the line broke")
        if fate < 0.3:
            raise ProtocolError("the round is not open")
        if fate < 0.9:  # and else it asks for the same round again, as a coordinator put back in time does
            self.move_on()
        if fate < 0.4:
            raise UpdateRejected("not finite")
        return False

    def exchange(self, message: object) -> None:
        raise AssertionError("no secure sum here")

    def heartbeat(self) -> RoundStatus:
        return RoundStatus(0, True, 0)

    def leave(self, reason: str, score: tuple[float, ...] = ()) -> None:
        self.move_on()


class Toy:
    """Draws noise, and says so; charges and releases as the trainer does."""

    declared_examples = 0
    schema = SCHEMA

    def __init__(self, world: World, ledger: Ledger, disk: Disk) -> None:
        self.world, self.ledger, self.disk = world, ledger, disk

    def train(self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled) -> Trained:
        spend = self.world.rng.choice(SPENDS)
        number = self.ledger.reserve(run, assignment.round, spend, budget=30.0, delta=DELTA)
        self.world.note("noised", SPENDS.index(spend))
        self.disk.point()
        noise = np.frombuffer(os.urandom(4), np.uint16).astype(np.float32).reshape(1, 2)
        return Trained({"m.A": noise}, number)

    def release(self, charge: int | None, digest: str) -> None:
        assert charge is not None
        self.ledger.release(charge, digest)

    def drop(self, why: str | None) -> bool:
        return self.ledger.drop(why)


def live(world: World, disk: Disk) -> None:
    """One process from its start to its end, which may be a `Crash` at any write."""
    ledger = None
    try:
        with standing_between(disk):
            ledger = world.ledger()
            toy = Toy(world, ledger, disk)
            participant = Participant(world, POLICY, lambda _: toy, outbox=world.folder / "outbox")
            participant.join()
            for _ in range(world.rng.randrange(1, 5)):
                with suppress(Unavailable):
                    participant.step()
    except (Crash, BudgetError):
        pass
    except PolicyError as error:
        if "two different updates" not in str(error) and "came to nothing" not in str(error):
            raise
    finally:
        if ledger is not None:
            ledger.close()


def live_and_die(world: World, fuse: int) -> None:
    """The same in a process of its own, which ends by `os._exit`."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            world.pipe = writer
            live(world, Disk(fuse, real=True))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as events:
        for event in map(json.loads, events):
            world.log.append(tuple(event))
            if event[0] == "round":
                world.round = event[1]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in {0, 7}
    world.rng.random()  # the child drew its own numbers; do not repeat them


def check(world: World) -> list[Spend]:
    """The promises, as an observer of the disk and the line can check them; returns every spend charged."""
    with world.ledger() as ledger:
        charges = ledger.charges()
    charged = Counter(charge.spend for charge in charges)
    noised = Counter(SPENDS[event[1]] for event in world.log if event[0] == "noised")
    assert noised <= charged, "noise was drawn that no charge covers"
    left: dict[int, set[bytes]] = {}
    for event in world.log:
        if event[0] == "left":
            left.setdefault(event[1], set()).add(bytes.fromhex(event[2]))
    released = {charge.round: charge.digest for charge in charges if charge.digest is not None}
    for round, contents in left.items():
        assert len(contents) == 1, f"round {round} was answered with {len(contents)} different updates"
        assert released[round] == hashlib.sha256(*contents).hexdigest()
    return [charge.spend for charge in charges]


def tamper(world: World, older: bytes | None) -> None:
    """Do one thing to the closed ledger that it must notice, and undo it."""
    path = world.folder / "ledger" / f"{'ab' * 16}.ledger"
    (anchor,) = (world.folder / "anchors").glob("*.anchor")
    content, known = path.read_bytes(), anchor.read_bytes()
    kind = world.rng.randrange(5)
    if kind == 0 and older is not None:
        path.write_bytes(older)
    elif kind == 1:
        path.write_bytes(b"")
    elif kind == 2:
        path.rename(path.with_suffix(".gone"))
    elif kind == 3:
        with sqlite3.connect(path) as db:
            db.execute("UPDATE entry SET body = replace(body, ':', ': ') WHERE number = abs(random()) % 3 + 1")
        db.close()
    else:
        anchor.unlink()
    try:
        world.ledger().close()
    except LedgerError:
        pass
    else:
        raise AssertionError(f"change {kind} was not noticed")
    with suppress(FileNotFoundError):
        path.with_suffix(".gone").rename(path)
    path.write_bytes(content)
    anchor.write_bytes(known)


def sequence(folder: Path, rng: random.Random, *, forked: bool = False) -> list[Spend]:
    """Some lives of one client in an empty folder; returns what it was charged."""
    world, older = World(folder, rng), None
    for _ in range(rng.randrange(2, 5)):
        fuse = rng.randrange(1, 60)
        if forked:
            live_and_die(world, fuse)
        else:
            disk = Disk(fuse)
            live(world, disk)
            if disk.fuse <= 0 and rng.random() < 0.5:
                disk.lose_power(rng)
        charged = check(world)
        if len(charged) > 1 and rng.random() < 0.2:
            tamper(world, older)
        if older is None or rng.random() < 0.3:
            older = next((folder / "ledger").glob("*.ledger")).read_bytes() if charged else None
            if charged:
                # One more entry, so that the copy is older than the ledger.
                with world.ledger() as ledger:
                    ledger.reserve("other", world.round, SPENDS[0], budget=1e9, delta=DELTA)
    return charged


def cheap(spends: list[Spend], delta: float, grid: float = 0.0) -> float:
    """Grows with every spend, as epsilon does, and costs nothing."""
    return sum(spend.steps for spend in spends)


def sequences(count: int, seed: int, *, forked: bool = False) -> list[list[Spend]]:
    """Run `count` random sequences; returns what each was charged."""
    rng, clock = random.Random(seed), random.Random(seed)
    memory = Path("/dev/shm")  # where syncing costs nothing; what a loss of power takes is `Disk`'s business
    charged = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "epsilon", cheap)
        # A clock that jumps at will, back too.
        patch.setattr(module, "time", SimpleNamespace(time=lambda: clock.uniform(0, 2e9)))
        for _ in range(count):
            folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
            try:
                charged.append(sequence(folder, rng, forked=forked))
            finally:
                shutil.rmtree(folder)
    return charged


@pytest.mark.prove
@pytest.mark.timeout(2 * 3600)
def test_what_left_is_charged_and_left_once_whatever_happens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR")
    if os.environ.get("FEDLOOM_PROVE"):
        script = Path(__file__).parents[3] / "benchmarks" / "prove_ledger.py"
        subprocess.run([sys.executable, str(script), "--count", "100000"], check=True)
        return
    charged = sequences(200, seed=int(os.environ.get("FEDLOOM_SEED", "0")))

    assert sum(map(len, charged)) > 400


def test_the_same_holds_for_processes_that_really_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR")

    assert sum(map(len, sequences(25, seed=1, forked=True))) > 50


def test_what_is_charged_for_is_worth_its_epsilon(tmp_path: Path) -> None:
    """The multisets that the sequences compare, put through the accountant: more charges are never less epsilon."""
    world = World(tmp_path, random.Random(3))
    for fuse in (35, 10, 40):
        live(world, Disk(fuse))
    noised = [SPENDS[event[1]] for event in world.log if event[0] == "noised"]

    with world.ledger() as ledger:
        assert len(noised) > 2
        assert ledger.epsilon(DELTA) >= epsilon(noised, DELTA)
