import hashlib
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from fedloom.proto.codec import codec
from fedloom.proto.errors import ConfigError, ProtocolError, StoreError, UpdateRejected
from fedloom.proto.messages import Assignment, Finished, UpdateHeader, Wait, broadcast_schema, upload_schema
from fedloom.proto.run import RunConfig
from fedloom.proto.schema import Role, Schema, TensorSpec
from fedloom.server.coordinator import Coordinator
from fedloom.server.rounds import ClientLost, Event, RoundClosed, RoundOpened
from fedloom.server.store import Store
from fedloom.strategies.api import Plan, State, Strategy
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.state import state_to_bytes

SCHEMA = Schema(
    (
        TensorSpec("m.A", "m", Role.LORA_A, (2, 5)),
        TensorSpec("m.B", "m", Role.LORA_B, (4, 2)),
        TensorSpec("head", "head", Role.HEAD, (2, 4)),
    )
)
FEDAVG = FedAvg()


def config(length: int = 2, **sections: dict[str, object]) -> RunConfig:
    tables: dict[str, object] = {
        "run": {"name": "trial", "rounds": length, "seed": 3},
        "model": {"base": "tiny", "labels": ["no", "yes"]},
        "train": {"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1},
        "rounds": {"min_clients": 2, "deadline_s": 100.0, "lease_s": 10.0},
    }
    for name, section in sections.items():
        known = tables.get(name, {})
        assert isinstance(known, dict)
        tables[name] = {**known, **section}
    return RunConfig.model_validate(tables)


@dataclass
class Federation:
    """A coordinator and as many clients as somebody speaks for."""

    store: Store
    config: RunConfig = field(default_factory=config)
    strategy: Strategy = FEDAVG
    now_s: float = 0.0
    expect: int = 0
    runs: dict[str, tuple[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        starting = starting_adapter(SCHEMA, self.config.run.seed)
        self.coordinator = Coordinator(
            self.config,
            SCHEMA,
            self.strategy,
            self.store,
            starting=starting,
            clock=lambda: self.now_s,
            expect=self.expect,
        )

    def join(self, *clients: str, examples: int = 0) -> None:
        for client in clients:
            joined = self.coordinator.join(client, 1, examples)
            self.runs[client] = joined.run, joined.epoch

    def work(self, client: str) -> Assignment | Wait | Finished:
        return self.coordinator.work(client, *self.runs[client])

    def assignment(self, client: str) -> Assignment:
        answer = self.work(client)
        assert isinstance(answer, Assignment)
        return answer

    def update(self, client: str, shift: float | None = None) -> tuple[UpdateHeader, bytes]:
        """What `client` sends for its assignment: drawn from its name, the round and the broadcast."""
        assignment = self.assignment(client)
        derived = upload_schema(SCHEMA, assignment)
        broadcast = self.coordinator.blob(client, assignment.broadcast_digest, *self.runs[client])
        start = codec(assignment.broadcast_codec).decode(broadcast_schema(SCHEMA, assignment), broadcast)
        seed = int.from_bytes(hashlib.sha256(f"{client} {assignment.round}".encode()).digest()[:8], "big")
        noise = np.random.default_rng(seed)
        delta = {
            spec.name: (0.1 * start[spec.name] + noise.normal(size=spec.shape)).astype(np.float32)
            if shift is None
            else np.full(spec.shape, shift, np.float32)
            for spec in derived.tensors
        }
        payload = codec(assignment.upload_codec).encode(derived, delta)
        digest = hashlib.sha256(payload).hexdigest()
        header = UpdateHeader(client, assignment.round, derived.digest, assignment.upload_codec, len(payload), digest)
        return header, payload

    def send(self, header: UpdateHeader, payload: bytes) -> bool:
        return self.coordinator.submit(header, payload, *self.runs[header.client])

    def begin(self, *clients: str, examples: int = 0) -> None:
        self.join(*clients, examples=examples)
        for client in clients:
            self.work(client)

    def adapter(self) -> dict[str, list[float]]:
        return {name: tensor.ravel().tolist() for name, tensor in self.coordinator.state.adapter.items()}


@pytest.fixture
def store(tmp_path: Path):  # type: ignore[no-untyped-def]  # pytest infers it
    with Store(tmp_path / "state", durable=False) as opened:
        yield opened


def test_a_run_from_join_to_the_final_adapter(store: Store) -> None:
    federation = Federation(store)
    commits: list[tuple[int, State]] = []
    woken: list[int] = []
    federation.coordinator.on_commit = lambda rounds, state: commits.append((rounds, state))
    federation.coordinator.wake = lambda: woken.append(federation.coordinator.progress.round)
    start = federation.adapter()

    federation.begin("ann", "ben")
    for _ in range(2):
        assert not federation.send(*federation.update("ann", 1.0))
        assert federation.work("ann") == Wait(0.0)
        assert not federation.send(*federation.update("ben", 3.0))

    final = federation.work("ann")
    assert isinstance(final, Finished)
    payload = federation.coordinator.blob("ann", final.digest, *federation.runs["ann"])
    assert hashlib.sha256(payload).hexdigest() == final.digest
    tensors = codec(final.codec).decode(SCHEMA, payload)
    for name, tensor in tensors.items():
        np.testing.assert_allclose(tensor.ravel(), np.array(start[name]) + 4.0, rtol=1e-6)
    assert [rounds for rounds, _ in commits] == [1, 2]
    assert commits[-1][1] is federation.coordinator.state
    assert woken == [0, 1, 2]
    assert federation.coordinator.finished


def test_weights_follow_the_declared_examples(store: Store) -> None:
    federation = Federation(store, config(1, strategy={"weighting": "examples"}))
    start = federation.adapter()
    federation.join("ann", examples=300)
    federation.join("ben", examples=100)
    federation.work("ann")

    federation.send(*federation.update("ben", 1.0))
    federation.send(*federation.update("ann", 5.0))

    np.testing.assert_allclose(federation.adapter()["head"], np.array(start["head"]) + 4.0, rtol=1e-6)


def test_a_client_that_declares_no_examples_may_look_but_gets_no_work(store: Store) -> None:
    federation = Federation(store, config(strategy={"weighting": "examples"}))
    federation.join("ann")

    with pytest.raises(ConfigError, match="declares no examples"):
        federation.work("ann")
    assert federation.coordinator.progress.live == ()
    federation.coordinator.leave("ann", "only looked", *federation.runs["ann"])


def test_a_client_that_declares_more_examples_than_anybody_has_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="at most"):
        Federation(store).join("ann", examples=10**12 + 1)


@pytest.mark.parametrize("name", ["", "a" * 257, "two words", "tab\t", "\x1b[31m"])
def test_a_name_that_is_none_is_refused(store: Store, name: str) -> None:
    with pytest.raises(ProtocolError, match="client name"):
        Federation(store).join(name)


def test_another_protocol_version_is_refused(store: Store) -> None:
    with pytest.raises(ProtocolError, match="protocol 2"):
        Federation(store).coordinator.join("ann", 2, 0)


def test_a_cohort_smaller_than_the_minimum_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="clients_per_round = 1"):
        Federation(store, config(rounds={"clients_per_round": 1}))


def test_a_strategy_that_trains_a_frozen_head_is_refused(store: Store) -> None:
    federation = Federation(store, config(model={"head": "frozen"}))

    with pytest.raises(ConfigError, match="head"):
        federation.begin("ann", "ben")


def test_arrival_order_does_not_matter(tmp_path: Path) -> None:
    results = []
    for number, order in enumerate(itertools.permutations(["ann", "ben", "cat"])):
        with Store(tmp_path / str(number), durable=False) as store:
            federation = Federation(store, config(1), expect=3)
            federation.begin(*order)
            for client in order:
                federation.send(*federation.update(client))
            results.append(federation.adapter())

    assert all(result == results[0] for result in results)


def test_the_same_update_twice_is_taken_once(store: Store) -> None:
    federation = Federation(store)
    federation.begin("ann", "ben")
    update = federation.update("ann")

    assert federation.send(*update) is False
    assert federation.coordinator.check_header(update[0], *federation.runs["ann"]) is None
    assert federation.send(*update) is True
    federation.send(*federation.update("ben"))
    assert federation.coordinator.progress.round == 1
    assert federation.send(*update) is True


def test_another_update_for_the_same_round_is_refused(store: Store) -> None:
    federation = Federation(store)
    federation.begin("ann", "ben")
    first, second = federation.update("ann", 1.0), federation.update("ann", 2.0)
    federation.send(*first)

    with pytest.raises(ProtocolError, match="already sent another update"):
        federation.send(*second)
    federation.send(*federation.update("ben"))
    with pytest.raises(ProtocolError, match="already sent another update"):
        federation.send(*second)


def changed(header: UpdateHeader, **changes: object) -> UpdateHeader:
    return replace(header, **changes)  # type: ignore[arg-type]  # the table below names real fields


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"round": 1}, "is for round 1, but round 0 is open"),
        ({"round": 2**32 - 1}, "but round 0 is open"),
        ({"schema_digest": "ab" * 32}, "exactly the trained roles"),
        ({"codec": "fp16"}, "takes 'fp32'"),
        ({"payload_bytes": 0}, "announces 0 bytes"),
        ({"payload_bytes": 2**32}, "announces 4294967296 bytes"),
    ],
)
def test_a_header_that_does_not_fit_is_refused_before_its_payload(
    store: Store, changes: dict[str, object], text: str
) -> None:
    federation = Federation(store)
    federation.begin("ann", "ben")
    header, _ = federation.update("ann")

    with pytest.raises(ProtocolError, match=text):
        federation.coordinator.check_header(changed(header, **changes), *federation.runs["ann"])


@pytest.mark.parametrize("spoil", [lambda p: p[:-1], lambda p: p + b"\0", lambda p: b""])
def test_a_payload_of_another_length_is_refused(store: Store, spoil: Callable[[bytes], bytes]) -> None:
    federation = Federation(store)
    federation.begin("ann", "ben")
    header, payload = federation.update("ann")

    with pytest.raises(ProtocolError, match="its header and the schema say"):
        federation.send(header, spoil(payload))


def test_a_payload_with_another_digest_is_refused_and_may_be_sent_again(store: Store) -> None:
    federation = Federation(store)
    federation.begin("ann", "ben")
    header, payload = federation.update("ann")

    with pytest.raises(ProtocolError, match="digest"):
        federation.send(header, payload[:-1] + bytes([payload[-1] ^ 1]))
    assert federation.send(header, payload) is False


def test_messages_of_another_run_epoch_or_client_are_refused(store: Store) -> None:
    federation = Federation(store)
    federation.begin("ann", "ben")
    run, epoch = federation.runs["ann"]
    header, payload = federation.update("ann")

    with pytest.raises(ProtocolError, match="is not the one served here"):
        federation.coordinator.work("ann", "other", epoch)
    with pytest.raises(ProtocolError, match="epoch 0"):
        federation.coordinator.submit(header, payload, run, epoch - 1)
    with pytest.raises(ProtocolError, match="'eve' is not known"):
        federation.coordinator.heartbeat("eve", run, epoch)
    with pytest.raises(ProtocolError, match="'eve' is not known"):
        federation.coordinator.check_header(replace(header, client="eve"), run, epoch)


def test_a_client_outside_the_cohort_gets_nothing(store: Store) -> None:
    federation = Federation(store)
    federation.begin("ann", "ben", "eve")
    assignment = federation.assignment("ann")
    header, _ = federation.update("ann")

    assert federation.work("eve") == Wait(0.0)
    with pytest.raises(ProtocolError, match="may not fetch"):
        federation.coordinator.blob("eve", assignment.broadcast_digest, *federation.runs["eve"])
    with pytest.raises(ProtocolError, match="not asked to train"):
        federation.coordinator.check_header(replace(header, client="eve"), *federation.runs["eve"])


def test_a_blob_is_fetched_by_its_digest_and_offset_only(store: Store) -> None:
    federation = Federation(store)
    federation.begin("ann", "ben")
    assignment = federation.assignment("ann")
    at = assignment.broadcast_digest

    federation.coordinator.blob("ann", at, *federation.runs["ann"], 60)
    with pytest.raises(ProtocolError, match="offset"):
        federation.coordinator.blob("ann", at, *federation.runs["ann"], assignment.broadcast_bytes + 1)
    with pytest.raises(ProtocolError, match="may not fetch"):
        federation.coordinator.blob("ann", "ab" * 32, *federation.runs["ann"])

    assert federation.coordinator.progress.bytes_by_client["ann"] == (assignment.broadcast_bytes - 60, 0)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_a_poisoned_update_is_refused_and_the_round_goes_on_without_it(tmp_path: Path, poison: float) -> None:
    results = []
    for name, clients in (("with", ("ann", "bad", "cat")), ("without", ("ann", "cat"))):
        with Store(tmp_path / name, durable=False) as store:
            federation = Federation(store, config(1), expect=len(clients))
            federation.begin(*clients)
            for client in clients:
                if client == "bad":
                    update = federation.update(client, poison)
                    for _ in range(2):
                        with pytest.raises(UpdateRejected):
                            federation.send(*update)
                    assert federation.work(client) == Wait(0.0)
                else:
                    federation.send(*federation.update(client))
            assert federation.coordinator.finished
            results.append(federation.adapter())

    assert results[0] == results[1]


def test_a_dead_client_is_not_waited_for_longer_than_its_lease(store: Store) -> None:
    federation = Federation(store, expect=3)
    federation.begin("ann", "ben", "cat")
    federation.send(*federation.update("ann"))
    federation.send(*federation.update("ben"))
    federation.now_s = 9.0
    federation.coordinator.heartbeat("ann", *federation.runs["ann"])
    federation.coordinator.heartbeat("ben", *federation.runs["ben"])

    federation.coordinator.tick()
    assert federation.coordinator.progress.round == 0
    federation.now_s = 10.5
    federation.coordinator.tick()

    assert federation.coordinator.progress.round == 1
    assert federation.coordinator.progress.cohort == ("ann", "ben")
    assert [event for event in store.events() if isinstance(event, ClientLost)] == [ClientLost(0, "cat", "lease")]


def test_a_late_update_is_refused_and_its_client_takes_part_again(store: Store) -> None:
    federation = Federation(store, expect=3)
    federation.begin("ann", "ben", "cat")
    late = federation.update("cat")
    federation.now_s = 11.0
    for client in ("ann", "ben"):
        federation.coordinator.heartbeat(client, *federation.runs[client])
        federation.send(*federation.update(client))

    assert federation.coordinator.progress.round == 1
    with pytest.raises(ProtocolError, match="is for round 0, but round 1 is open"):
        federation.send(*late)
    for client in ("ann", "ben"):
        federation.send(*federation.update(client))
    assert federation.coordinator.finished


def test_a_client_that_leaves_is_not_waited_for_and_may_come_back(store: Store) -> None:
    federation = Federation(store, expect=3)
    federation.begin("ann", "ben", "cat")
    federation.send(*federation.update("ann"))
    federation.send(*federation.update("ben"))

    federation.coordinator.leave("cat", "budget spent", *federation.runs["cat"])
    assert federation.coordinator.progress.round == 1
    assert "cat" not in federation.coordinator.progress.live
    federation.work("cat")

    assert "cat" in federation.coordinator.progress.live


def test_the_deadline_closes_a_round_with_the_updates_it_has(store: Store) -> None:
    federation = Federation(store, config(rounds={"deadline_s": 5.0}), expect=3)
    federation.begin("ann", "ben", "cat")
    federation.send(*federation.update("ann"))
    federation.send(*federation.update("cat"))
    federation.now_s = 4.9
    federation.coordinator.tick()
    assert federation.coordinator.progress.round == 0

    federation.now_s = 5.0
    federation.coordinator.tick()

    assert federation.coordinator.progress.round == 1
    assert RoundClosed(0, ("ann", "cat"), "deadline") in store.events()


def test_a_short_round_says_so_and_goes_on_with_another_client(store: Store) -> None:
    federation = Federation(store)
    federation.begin("ann", "ben")
    federation.send(*federation.update("ann"))
    federation.coordinator.leave("ben", "", *federation.runs["ben"])
    assert federation.coordinator.progress.short

    federation.begin("cat")
    federation.send(*federation.update("cat"))

    assert federation.coordinator.progress.round == 1
    openings = [event for event in store.events() if isinstance(event, RoundOpened)]
    assert [(event.round, event.attempt, event.cohort) for event in openings] == [
        (0, 0, ("ann", "ben")),
        (0, 1, ("ann", "cat")),
        (1, 0, ("ann", "cat")),
    ]


def test_updates_are_dropped_from_the_disk_after_the_commit(store: Store) -> None:
    federation = Federation(store)
    federation.begin("ann", "ben")
    federation.send(*federation.update("ann"))
    assert len(list((store.folder / "blobs").iterdir())) == 2

    federation.send(*federation.update("ben"))

    federation.coordinator.tick()
    (left,) = (store.folder / "blobs").iterdir()
    assert left.name == hashlib.sha256(state_to_bytes(federation.coordinator.state)).hexdigest()


def test_clients_with_the_same_plan_share_one_broadcast_and_others_do_not(store: Store) -> None:
    class ByRank(FedAvg):
        def plan(self, state: State, round: int, client: str) -> Plan:
            plan = super().plan(state, round, client)
            if client != "low":
                return plan
            small = {"m.A": state.adapter["m.A"][:1], "m.B": state.adapter["m.B"][:, :1]}
            return replace(plan, rank=1, broadcast={**plan.broadcast, **small})

    federation = Federation(store, strategy=ByRank(), expect=3)
    federation.begin("ann", "ben", "low")

    ann, ben, low = (federation.assignment(client) for client in ("ann", "ben", "low"))
    assert ann is ben
    assert low.rank == 1
    assert low.broadcast_bytes == ann.broadcast_bytes - 4 * (5 + 4)
    with pytest.raises(ProtocolError, match="may not fetch"):
        federation.coordinator.blob("ann", low.broadcast_digest, *federation.runs["ann"])


def test_the_run_is_over_once_every_live_client_has_its_end(store: Store) -> None:
    federation = Federation(store, config(1))
    federation.begin("ann", "ben")
    federation.send(*federation.update("ann"))
    federation.send(*federation.update("ben"))
    final = federation.work("ann")
    assert isinstance(final, Finished)
    assert not federation.coordinator.over

    federation.coordinator.blob("ann", final.digest, *federation.runs["ann"])
    assert not federation.coordinator.over
    federation.coordinator.leave("ben", "done", *federation.runs["ben"])

    assert federation.coordinator.over


def test_many_threads_make_one_run(store: Store) -> None:
    names = [f"c{number}" for number in range(6)]
    federation = Federation(store, config(5), expect=len(names))
    federation.join(*names)
    errors: list[BaseException] = []

    def client(name: str) -> None:
        try:
            while not isinstance(answer := federation.work(name), Finished):
                if isinstance(answer, Assignment):
                    federation.send(*federation.update(name))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not errors
    assert federation.coordinator.finished
    closings = [event for event in store.events() if isinstance(event, RoundClosed)]
    assert [event.clients for event in closings] == [tuple(names)] * 5


class Crash(Exception):
    """The process dies here."""


class Dying(Store):
    """A store whose process dies just before or just after its n-th write."""

    left = -1
    after = False

    def append(self, *events: Event) -> None:
        self._step(lambda: Store.append(self, *events))

    def put_blob(self, blob: bytes, digest: str | None = None) -> str:
        self._step(lambda: Store.put_blob(self, blob, digest))
        return digest or hashlib.sha256(blob).hexdigest()

    def sweep(self, keep: object) -> None:
        self._step(lambda: Store.sweep(self, keep))  # type: ignore[arg-type]  # handed on as it came

    def _step(self, write: Callable[[], None] | Callable[[], str]) -> None:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Crash
        write()
        if self.left == 0:
            raise Crash


def run_to_the_end(folder: Path, strategy: Strategy, crash_at: int = 0, after: bool = False) -> tuple[str, int]:
    """Run three clients over two rounds, restarting after the crash; the final state's digest and the writes."""
    names = ("ann", "ben", "cat")
    steps = 10**9
    crashes = 0
    while True:
        with Dying(folder, durable=False) as store:
            store.left, store.after = (crash_at if crash_at and not crashes else steps), after
            try:
                federation = Federation(store, config(rounds={"min_clients": 3}), strategy)
                federation.begin(*names)
                while not federation.coordinator.finished:
                    for name in names:
                        if isinstance(federation.work(name), Assignment):
                            federation.send(*federation.update(name))
                state = federation.coordinator.state
                assert crashes == (1 if crash_at else 0)
                return hashlib.sha256(state_to_bytes(state)).hexdigest(), steps - store.left
            except Crash:
                crashes += 1


@pytest.mark.parametrize("strategy", [FedAvg(), FedSVD()], ids=["fedavg", "fedsvd"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_at_any_write_changes_nothing_in_the_result(tmp_path: Path, strategy: Strategy, after: bool) -> None:
    expected, writes = run_to_the_end(tmp_path / "smooth", strategy)
    assert writes > 15

    for crash_at in range(1, writes + 1):
        digest, _ = run_to_the_end(tmp_path / str(crash_at), strategy, crash_at, after)
        assert digest == expected, f"crash at write {crash_at}"


def test_a_logged_closing_is_not_decided_again(tmp_path: Path) -> None:
    section: dict[str, object] = {"deadline_s": 5.0}
    with Dying(tmp_path, durable=False) as store:
        federation = Federation(store, config(rounds=section), expect=3)
        federation.begin("ann", "ben", "cat")
        federation.send(*federation.update("ann"))
        federation.send(*federation.update("ben"))
        late = federation.update("cat")
        federation.now_s, store.left, store.after = 6.0, 1, True
        with pytest.raises(Crash):
            federation.coordinator.tick()

    with Store(tmp_path, durable=False) as store:
        again = Federation(store, config(rounds=section))
        assert again.coordinator.progress.round == 1
        again.join("cat")
        with pytest.raises(ProtocolError, match="is for round 0"):
            again.send(*late)
        assert RoundClosed(0, ("ann", "ben"), "deadline") in store.events()


def test_after_a_restart_the_cohort_has_one_lease_to_come_back(tmp_path: Path) -> None:
    with Store(tmp_path, durable=False) as store:
        federation = Federation(store, expect=3)
        federation.begin("ann", "ben", "cat")
        sent = federation.update("ann")
        federation.send(*sent)
        federation.send(*federation.update("ben"))

    with Store(tmp_path, durable=False) as store:
        again = Federation(store)
        assert (again.coordinator.epoch, again.coordinator.progress.round) == (2, 0)
        with pytest.raises(ProtocolError, match="now 2; join again"):
            again.coordinator.work("ann", *federation.runs["ann"])
        again.join("ann")
        assert again.send(*sent) is True
        again.now_s = 10.1
        again.coordinator.tick()
        assert again.coordinator.progress.round == 1


def test_a_directory_of_another_run_file_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path, durable=False) as store:
        Federation(store)

    with Store(tmp_path, durable=False) as store, pytest.raises(ConfigError, match="another run file"):
        Federation(store, config(train={"learning_rate": 0.2}))


def test_after_a_failed_write_nothing_is_answered(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation(store)
    federation.begin("ann", "ben")
    update = federation.update("ann")

    def fail(*events: Event) -> None:
        raise StoreError("disk gone")

    monkeypatch.setattr(store, "append", fail)
    with pytest.raises(StoreError, match="disk gone"):
        federation.send(*update)
    monkeypatch.undo()

    for call in (lambda: federation.work("ann"), lambda: federation.send(*update), federation.coordinator.tick):
        with pytest.raises(StoreError, match="disk gone"):
            call()


def test_a_result_that_is_not_finite_is_not_committed(store: Store) -> None:
    class Overflowing(FedAvg):
        def commit(self, state: State, acc: object) -> State:
            good = super().commit(state, acc)  # type: ignore[arg-type]  # handed on as it came
            return replace(good, adapter={**good.adapter, "head": np.full((2, 4), np.inf, np.float32)})

    federation = Federation(store, strategy=Overflowing())
    federation.begin("ann", "ben")
    federation.send(*federation.update("ann"))

    with pytest.raises(StoreError, match="nothing is committed"):
        federation.send(*federation.update("ben"))
    assert isinstance(store.events()[-1], RoundClosed)
