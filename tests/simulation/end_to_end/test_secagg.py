"""Secure sums with real clients and a real coordinator: exact, past dropouts and restarts, and unseen by anybody."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.client.policy import Policy
from fedloom.client.secagg.identity_key import load_identity, public_text
from fedloom.client.session.api import CheckCancelled, Trained
from fedloom.client.session.participant import Participant
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.codecs import dense
from fedloom.core.config.run import RunConfig, SecureAggregationSection
from fedloom.core.errors import ConfigError, PolicyError, ProtocolError, StoreError
from fedloom.core.schema import Role, Schema, Tensors, TensorSpec
from fedloom.core.secagg.fixed_point import FixedPoint, Words, words
from fedloom.proto.messages import Assignment, StepMessage, Wait
from fedloom.server.coordinator import Coordinator
from fedloom.server.rounds.aggregation import SUM, NextState
from fedloom.server.rounds.run_log import History
from fedloom.server.rpc.local import LocalConnection
from fedloom.server.rpc.server import serving
from fedloom.server.storage.local import Store
from fedloom.strategies.api import Plan, State, Traits, Update
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter

PAIR = TensorSpec("m.A", "m", Role.LORA_A, (4, 200)), TensorSpec("m.B", "m", Role.LORA_B, (300, 4))
SCHEMA = Schema((*PAIR, TensorSpec("head", "head", Role.HEAD, (2, 50))))
NAMES = ("ann", "ben", "cat", "dan")
SECTION = SecureAggregationSection(enabled=True, max_clients=16)
INTEGERS = FixedPoint(SECTION.max_change, SECTION.max_clients)


def config(length: int = 2, **sections: dict[str, object]) -> RunConfig:
    tables: dict[str, object] = {
        "run": {"name": "secure", "rounds": length, "seed": 3},
        "model": {"base": "none", "labels": ["no", "yes"]},
        "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
        "privacy": {"enabled": False},
        "rounds": {"min_clients": 3},
        "secure_aggregation": {"enabled": True, "max_clients": 16},
        **sections,
    }
    return RunConfig.model_validate(tables)


def change(name: str, round: int) -> dict[str, Any]:
    rng = np.random.default_rng([round, *name.encode()])
    return {each.name: rng.normal(0, 0.3, each.shape).astype(np.float32) for each in SCHEMA.tensors}


@dataclass
class Trainer:
    """Moves every value by what its name and the round give."""

    name: str
    schema: Schema = SCHEMA
    declared_examples: int = 1
    rounds: list[int] = field(default_factory=list)

    def train(self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled) -> Trained:
        self.rounds.append(assignment.round)
        return Trained(change(self.name, assignment.round), None)

    def release(self, charge: int | None, digest: str) -> None:
        pass

    def drop(self, why: str | None) -> bool:
        return False


def policy(folder: Path, name: str, names: tuple[str, ...] = NAMES) -> Policy:
    peers = {each: public_text(load_identity(folder / each)) for each in names}
    return Policy.model_validate(
        {
            "client": {"name": name, "state": folder / name},
            "data": {"source": "none"},
            "privacy": {"allow_non_private": True},
            "secure_aggregation": {"peers": peers},
        }
    )


class Line(LocalConnection):
    """To whichever coordinator is up, in this process."""

    def move(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator


@dataclass
class Federation:
    """Clients that take turns, until they are told to stop."""

    coordinator: Coordinator
    folder: Path
    names: tuple[str, ...] = NAMES

    def __post_init__(self) -> None:
        self.lines = {name: Line(self.coordinator) for name in self.names}
        self.trainers = {name: Trainer(name) for name in self.names}
        self.clients = {name: self.client(name) for name in self.names}
        for client in self.clients.values():
            client.join()

    def client(self, name: str) -> Participant:
        trainer = self.trainers[name]
        return Participant(self.lines[name], policy(self.folder, name, self.names), lambda joined: trainer)

    def move(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        for line in self.lines.values():
            line.move(coordinator)

    def turn(self, *names: str, times: int = 1) -> None:
        for _ in range(times):
            for name in names or tuple(self.clients):
                self.clients[name].step()

    def finish(self, *names: str) -> Tensors:
        for _ in range(100):
            if self.coordinator.finished:
                return self.coordinator.state.adapter
            self.turn(*names)
        raise AssertionError("the run does not end")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "state", durable=False) as opened:
        yield opened


def coordinate(store: Store, run: RunConfig, strategy: Any = None, expect: int = 4) -> Coordinator:
    starting = starting_adapter(SCHEMA, 1)
    return Coordinator(run, SCHEMA, strategy or FedAvg(), store, starting=starting, clock=lambda: 0.0, expect=expect)


def expected(names: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """The start plus the means, in float64, of what the clients send."""
    values = {name: tensor.astype(np.float64) for name, tensor in starting_adapter(SCHEMA, 1).items()}
    for round in range(rounds):
        for name in values:
            values[name] += np.mean([change(client, round)[name].astype(np.float64) for client in names], axis=0)
    return values


def close(adapter: Tensors, wanted: dict[str, Any], rounds: int) -> None:
    bound = rounds * (INTEGERS.step / 2 + 2e-7)
    assert adapter.keys() == wanted.keys()
    assert max(np.abs(adapter[name] - wanted[name]).max() for name in wanted) <= bound


# Whole runs


def test_a_secure_run_gives_the_mean_and_its_final_adapter(store: Store, tmp_path: Path) -> None:
    federation = Federation(coordinate(store, config()), tmp_path)

    close(federation.finish(), expected(NAMES, 2), 2)

    assert all(trainer.rounds == [0, 1] for trainer in federation.trainers.values())


def test_a_secure_run_over_grpc_gives_the_mean(store: Store, tmp_path: Path) -> None:
    coordinator = Coordinator(config(), SCHEMA, FedAvg(), store, starting=starting_adapter(SCHEMA, 1), expect=4)
    failures: list[BaseException] = []

    def life(name: str, address: str) -> None:
        connection, trainer = GrpcConnection(address), Trainer(name)
        try:
            Participant(connection, policy(tmp_path, name), lambda joined: trainer).run(patience_s=20)
        except BaseException as error:
            failures.append(error)
            raise
        finally:
            connection.close()

    with serving(coordinator) as address:
        threads = [threading.Thread(target=life, args=(name, address)) for name in NAMES]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

    assert not failures
    close(coordinator.state.adapter, expected(NAMES, 2), 2)


def test_a_third_of_the_clients_lost_after_masking_is_still_in_the_sum(store: Store, tmp_path: Path) -> None:
    names = (*NAMES, "eve", "fay")
    federation = Federation(coordinate(store, config(1), expect=6), tmp_path, names)
    federation.turn(times=3)
    for name in ("dan", "eve"):
        assert federation.coordinator.progress.bytes_by_client[name][1] == 4 * SCHEMA.size
        federation.lines[name].leave("power cut")
    close(federation.finish("ann", "ben", "cat", "fay"), expected(names, 1), 1)


def test_a_client_lost_before_masking_is_left_out_exactly(store: Store, tmp_path: Path) -> None:
    federation = Federation(coordinate(store, config(1)), tmp_path)
    federation.turn(times=2)
    federation.turn("ann", "ben", "cat")  # they mask against dan, who has shared
    assert federation.coordinator.progress.bytes_by_client["dan"][1] == 0
    federation.lines["dan"].leave("power cut")

    close(federation.finish("ann", "ben", "cat"), expected(("ann", "ben", "cat"), 1), 1)


def test_too_many_losses_begin_the_sum_anew_with_whoever_is_there(store: Store, tmp_path: Path) -> None:
    names = ("ann", "ben", "cat", "dan", "eve")
    federation = Federation(coordinate(store, config(1), expect=5), tmp_path, names)
    federation.turn(times=2)
    for name in ("dan", "eve"):
        federation.lines[name].leave("power cut")

    close(federation.finish("ann", "ben", "cat"), expected(("ann", "ben", "cat"), 1), 1)
    assert all(federation.trainers[name].rounds == [0] for name in ("ann", "ben", "cat"))


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_a_coordinator_that_restarts_begins_the_sum_anew_without_training(tmp_path: Path, turns: int) -> None:
    with Store(tmp_path / "state", durable=False) as store:
        federation = Federation(coordinate(store, config(1)), tmp_path)
        federation.turn(times=turns)
        assert not federation.coordinator.finished
    with Store(tmp_path / "state", durable=False) as store:
        federation.move(coordinate(store, config(1), expect=0))

        close(federation.finish(), expected(NAMES, 1), 1)

    assert all(trainer.rounds == [0] for trainer in federation.trainers.values())


def test_a_client_that_restarts_in_mid_sum_is_left_out(store: Store, tmp_path: Path) -> None:
    federation = Federation(coordinate(store, config(1)), tmp_path)
    federation.turn(times=2)
    federation.clients["dan"] = federation.client("dan")
    federation.clients["dan"].join()
    federation.turn("dan")
    federation.lines["dan"].leave("not in this sum")

    close(federation.finish("ann", "ben", "cat"), expected(("ann", "ben", "cat"), 1), 1)
    assert federation.trainers["dan"].rounds == [0], "a client that cannot take part is not made to train again"


def test_once_shares_are_out_the_round_is_not_opened_for_others(store: Store, tmp_path: Path) -> None:
    federation = Federation(coordinate(store, config(1)), tmp_path)
    federation.turn(times=4)
    federation.lines["ann"].leave("power cut")
    federation.lines["ben"].leave("power cut")
    stranger = LocalConnection(federation.coordinator)
    stranger.join("eve", 0)
    assert isinstance(stranger.work(), Wait)
    assert federation.coordinator.progress.cohort == NAMES
    close(federation.finish(), expected(NAMES, 1), 1)


def test_a_sum_is_on_the_disk_before_it_is_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator dies between taking the sum in and the commit, and goes on from what it has written."""
    with Store(tmp_path / "state", durable=False) as store, monkeypatch.context() as patch:
        federation = Federation(coordinate(store, config(1)), tmp_path)

        def die(history: History, after: NextState) -> None:
            raise StoreError("power cut")

        patch.setattr(History, "commit", die)
        with pytest.raises(StoreError, match="power cut"):
            federation.finish()
    with Store(tmp_path / "state", durable=False) as store:
        coordinator = coordinate(store, config(1))

        assert coordinator.finished
        close(coordinator.state.adapter, expected(NAMES, 1), 1)


# What the coordinator gets to see


def test_no_update_is_ever_decoded_or_folded_by_itself(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded: list[str] = []
    means: list[int] = []
    decoded: list[int] = []

    class Watched(FedAvg):
        def fold(self, state: State, acc: Any, update: Update) -> Any:
            folded.append(update.client)
            return super().fold(state, acc, update)

    mean, decode = FixedPoint.mean, dense.Dense.decode

    def watched_mean(numbers: FixedPoint, schema: Schema, total: Words, shared: bytes, owns: Sequence[bytes]) -> Any:
        means.append(len(owns))
        return mean(numbers, schema, total, shared, owns)

    def watched_decode(codec: dense.Dense, schema: Schema, payload: bytes) -> Any:
        decoded.append(len(payload))
        return decode(codec, schema, payload)

    monkeypatch.setattr(FixedPoint, "mean", watched_mean)
    federation = Federation(coordinate(store, config(2), Watched()), tmp_path)
    monkeypatch.setattr(dense.Dense, "decode", watched_decode)
    federation.finish()

    assert folded == [SUM, SUM]
    assert means == [4, 4]
    # Every client reads its broadcast; the coordinator reads each round's broadcast and its one mean.
    assert len(decoded) == 2 * (4 + 2)


def test_what_is_sent_is_not_the_update(store: Store, tmp_path: Path) -> None:
    federation = Federation(coordinate(store, config(1)), tmp_path)
    sent: list[bytes] = []
    line = federation.lines["ann"]
    original = line.submit

    def watched(header: Any, payload: bytes) -> bool:
        sent.append(payload)
        assert header.codec == "secagg32"
        return original(header, payload)

    line.submit = watched  # type: ignore[method-assign]
    federation.finish()

    (payload,) = sent
    plain = words(INTEGERS.encode(SCHEMA, change("ann", 0)), "<u4")
    assert len(payload) == 4 * SCHEMA.size
    assert (words(payload, "<u4") == plain).mean() < 0.01
    kept = [blob.read_bytes() for blob in (store.folder / "blobs").iterdir()]
    assert not any(plain.tobytes()[:64] in blob or payload[:64] in blob for blob in kept)


# What is refused


class Alone(FedAvg):
    """Says that it needs every update by itself."""

    traits = Traits(same_tensors=True)


@dataclass(frozen=True)
class Uneven(FedAvg):
    """Asks another thing of every client."""

    def plan(self, state: State, round: int, client: str) -> Plan:
        return Plan(train=SCHEMA.roles, broadcast=state.adapter, local={"learning_rate": float(len(client))})


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"strategy": {"weighting": "examples"}}, 'weighting = "examples"'),
        ({"rounds": {"min_clients": 2}}, "each client knows the other's"),
        ({"rounds": {"min_clients": 3, "clients_per_round": 17}}, "a sum over 17 clients"),
    ],
)
def test_a_run_that_cannot_be_summed_is_refused(store: Store, sections: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        coordinate(store, config(**sections))


def test_a_strategy_that_needs_single_updates_is_refused_by_name(store: Store) -> None:
    with pytest.raises(ConfigError, match="strategy 'krum' needs every update by itself"):
        coordinate(store, config(strategy={"name": "krum"}), Alone())


def test_a_strategy_that_treats_clients_differently_is_refused(store: Store, tmp_path: Path) -> None:
    federation = Federation(coordinate(store, config(1), Uneven(), expect=3), tmp_path, ("ann", "ben", "clara"))

    with pytest.raises(ConfigError, match="asks different things of different clients"):
        federation.turn(times=2)


def test_a_client_whose_peers_are_not_pinned_leaves_before_it_masks(store: Store, tmp_path: Path) -> None:
    federation = Federation(coordinate(store, config(1)), tmp_path)
    stranger = policy(tmp_path, "ann", ("ann", "ben", "cat"))
    trainer = federation.trainers["ann"]
    federation.clients["ann"] = Participant(federation.lines["ann"], stranger, lambda joined: trainer)
    federation.clients["ann"].join()

    with pytest.raises(PolicyError, match="peer 'dan' is in the cohort but not in this site's policy"):
        federation.turn(times=3)
    assert federation.coordinator.progress.lost == {"ann": "left"}


def test_an_open_run_has_no_steps(store: Store, tmp_path: Path) -> None:
    federation = Federation(coordinate(store, config(1, secure_aggregation={})), tmp_path)

    with pytest.raises(ProtocolError, match="no secure sums"):
        federation.lines["ann"].exchange(StepMessage(0, 1, {}))  # type: ignore[arg-type]  # any step will do
