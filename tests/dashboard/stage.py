"""A real coordinator with its dashboard, and clients over real sockets that send whatever a test wants."""

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.codecs import codec
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ProtocolError
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.proto.messages import Assignment, Finished, Joined, UpdateHeader, upload_schema
from fedloom.server.auth.ca import create
from fedloom.server.build import build_strategy
from fedloom.server.coordinator import Coordinator
from fedloom.server.monitoring.dashboard.access import Tokens
from fedloom.server.monitoring.dashboard.hosting import hosting
from fedloom.server.monitoring.dashboard.runs import Board
from fedloom.server.monitoring.recorders.background import Scorer
from fedloom.server.monitoring.status import Observation, observing
from fedloom.server.rpc.server import serving
from fedloom.server.storage.local import Store
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter

SCHEMA = Schema(
    tuple(
        TensorSpec(f"layer.{layer}.query.{name}", f"layer.{layer}.query", role, shape)
        for layer in range(4)
        for name, role, shape in (("A", Role.LORA_A, (8, 384)), ("B", Role.LORA_B, (384, 8)))
    ),
    2.0,
)
TOKENS = Tokens("observer-" + "o" * 40, "operator-" + "p" * 40)


def config(name: str = "ward-notes", rounds: int = 10, **sections: dict[str, object]) -> RunConfig:
    """The privacy of the README's demo, whose noise need not be calibrated again."""
    tables: dict[str, dict[str, object]] = {
        "run": {"name": name, "rounds": rounds, "seed": 3},
        "model": {"base": "minilm-l6", "labels": ["negative", "positive"]},
        "train": {"steps": 10, "sampling_rate": 0.02, "learning_rate": 4.0},
        "privacy": {"epsilon": 6.0, "delta": 1e-5, "noise_multiplier": 0.595},
        "rounds": {"min_clients": 2, "deadline_s": 600.0, "lease_s": 600.0},
    }
    for section, keys in sections.items():
        tables[section] = {**tables.get(section, {}), **keys}
    return RunConfig.model_validate(tables)


@dataclass
class Client:
    """One client: a line of its own, and no data."""

    name: str
    address: str

    def __post_init__(self) -> None:
        self.score: tuple[float, ...] = ()  # what it says of rows that it has not got
        self.line = GrpcConnection(self.address)
        self.joined: Joined = self.line.join(self.name, 0)
        self.assignment: Assignment | Finished | None = None

    def ask(self) -> None:
        """Wait for work."""
        for _ in range(10):
            answer = self.line.work()
            if isinstance(answer, Assignment | Finished):
                self.assignment = answer
                return
        raise AssertionError(f"{self.name} gets no work: the round that is open was opened without it")

    def send(self, value: float = 0.01) -> None:
        """Fetch the broadcast and send a change with this value everywhere."""
        assignment = self.assignment
        assert isinstance(assignment, Assignment)
        self.line.fetch(assignment.broadcast_digest, assignment.broadcast_bytes)
        schema = upload_schema(self.joined.schema, assignment)
        delta = {spec.name: np.full(spec.shape, value, np.float32) for spec in schema.tensors}
        payload = codec(assignment.upload_codec).encode(schema, delta)
        digest = hashlib.sha256(payload).hexdigest()
        about = assignment.round, schema.digest, assignment.upload_codec, len(payload), digest
        self.line.submit(UpdateHeader(self.name, *about, score=self.score), payload)


@dataclass
class Stage:
    """Everything a test may touch."""

    coordinator: Coordinator
    observation: Observation
    board: Board
    store: Store
    folder: Path
    """The run folder."""
    address: str
    """Of the gRPC server; empty if there is none."""
    url: str
    """Of the dashboard."""
    clients: list[Client] = field(default_factory=list)

    def join(self, *names: str) -> None:
        """Let clients join."""
        self.clients += [Client(name, self.address) for name in names]

    def ask(self) -> None:
        """Let all clients ask for work at once; returns when each has some."""
        with ThreadPoolExecutor(len(self.clients)) as pool:
            list(pool.map(Client.ask, self.clients))

    def rounds(self, count: int) -> None:
        """Let all clients do whole rounds."""
        for _ in range(count):
            self.ask()
            done = self.coordinator.state.round
            for client in self.clients:
                client.send()
            # The server commits in a thread of its own.
            for _ in range(3000):
                if self.coordinator.state.round > done:
                    break
                time.sleep(0.01)

    def stranger(self, name: str) -> None:
        """Somebody tries to join under a name that is none."""
        line = GrpcConnection(self.address)
        try:
            line.join(name, 0)
        except ProtocolError:
            self.coordinator.tick()  # writes the note of it
        else:
            raise AssertionError(f"{name!r} was let in")
        finally:
            line.close()


@contextmanager
def stage(
    runs: Path,
    run: RunConfig | None = None,
    *,
    listen: str = "127.0.0.1:0",
    expect: int = 0,
    strategy: bool = False,
    score: Scorer | None = None,
) -> Iterator[Stage]:
    """A coordinator that serves a run in `runs`, its dashboard, and no clients yet; with its own strategy or FedAvg."""
    chosen = run or config()
    folder = runs / chosen.run.name
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        store = stack.enter_context(Store(folder / "state", durable=False))
        starting = starting_adapter(SCHEMA, chosen.run.seed)
        rule = build_strategy(chosen) if strategy else FedAvg()
        coordinator = Coordinator(chosen, SCHEMA, rule, store, starting=starting, expect=expect)
        observation = stack.enter_context(observing(coordinator, store, folder, score=score))
        coordinator.on_commit = observation.committed
        create(folder / "certs", [])
        board = Board(coordinator, observation, runs, folder / "certs")
        hosted = stack.enter_context(hosting(board, listen, TOKENS))
        address = stack.enter_context(serving(coordinator, linger_s=0.0, observation=observation))
        made = Stage(coordinator, observation, board, store, folder, address, hosted.url)
        yield made
        for client in made.clients:
            client.line.close()


def finished_run(runs: Path, name: str, accuracies: list[float | None], losses: list[float | None]) -> None:
    """A run folder as `fedloom simulate` leaves it, with these scores and an adapter of a few bytes."""
    import tomli_w

    rounds = len(accuracies) - 1
    run = config(name, rounds)
    folder = runs / name
    with Store(folder / "state", durable=False) as store:
        coordinator = Coordinator(run, SCHEMA, FedAvg(), store, starting=starting_adapter(SCHEMA, 3), expect=4)
        names = ["film", "news", "shop", "tweets"]
        joined = {each: coordinator.join(each, 1, 0) for each in names}
        for _ in range(rounds):
            for each in names:
                coordinator.work(each, joined[each].run, joined[each].epoch)
            for each in names:
                answer = coordinator.work(each, joined[each].run, joined[each].epoch)
                assert isinstance(answer, Assignment)
                schema = upload_schema(SCHEMA, answer)
                payload = codec(answer.upload_codec).encode(schema, schema.zeros())
                digest = hashlib.sha256(payload).hexdigest()
                header = UpdateHeader(each, answer.round, schema.digest, answer.upload_codec, len(payload), digest)
                coordinator.submit(header, payload, joined[each].run, joined[each].epoch)
        coordinator.close()
    with closing(sqlite3.connect(folder / "state/run.db")) as db, db:
        # As if each round had taken 45 s: no chain covers the times.
        db.execute(
            "UPDATE times SET at_s = at_s + 45 * (SELECT count(*) FROM events AS past WHERE past.seq <= times.seq "
            "AND past.body LIKE '%AdapterCommitted%') + (SELECT CASE WHEN body LIKE '%UpdateAccepted%' "
            "THEN 26 + seq % 5 * 4 ELSE 0 END FROM events WHERE events.seq = times.seq)"
        )
    (folder / "run.toml").write_text(tomli_w.dumps(run.model_dump(mode="json", exclude_none=True)))
    lines = [
        {
            **{"round": number, "clients": 4 if number else 0, "accuracy": accuracy, "loss": loss},
            **{"epsilon": None, "privacy": None, "seconds": 45.2 * number},
            **{"bytes_up": 596_000 if number else 0, "bytes_down": 1_192_000 if number else 0},
        }
        for number, (accuracy, loss) in enumerate(zip(accuracies, losses, strict=True))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "adapter").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors", "fedloom.json"):
        (folder / "adapter" / file).write_text("{}")
