import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from fedloom.core import errors
from fedloom.core.codecs import codec
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError, FedloomError, StoreError, StrategyError
from fedloom.core.limits import CHUNK_BYTES
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.proto.messages import Assignment, Finished, Joined, UpdateHeader, Wait, upload_schema
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.v1.federation_pb2_grpc import FederationStub
from fedloom.proto.wire import answer_from_wire, from_wire, header_to_wire
from fedloom.server.coordinator import Coordinator
from fedloom.server.rounds.state import Event
from fedloom.server.rpc.server import serving
from fedloom.server.rpc.servicer import INTERNAL, status_of
from fedloom.server.storage.local import Store
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter

# A little over one chunk in each direction, so that chunking is exercised.
SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (8, 20_000)), TensorSpec("m.B", "m", Role.LORA_B, (20_000, 8))))
TIMEOUT_S = 30.0


def config(length: int = 1, lease_s: float = 30.0) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "trial", "rounds": length},
            "model": {"base": "tiny", "labels": ["no", "yes"]},
            "train": {"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1},
            "rounds": {"min_clients": 2, "lease_s": lease_s},
            "wire": {"upload": "fp32", "broadcast": "fp32"},
        }
    )


def coordinator(store: Store, run: RunConfig, strategy: FedAvg | None = None) -> Coordinator:
    return Coordinator(run, SCHEMA, strategy or FedAvg(), store, starting=starting_adapter(SCHEMA, 0))


class Client:
    """A client without a model: what it sends is a constant."""

    def __init__(self, address: str, name: str) -> None:
        self.address = address
        self.name = name
        self.channel = grpc.insecure_channel(address)
        self.stub = FederationStub(self.channel)

    def join(self) -> Joined:
        request = pb.JoinRequest(client=self.name, protocol=1)
        self.joined = from_wire(Joined, self.stub.Join(request, timeout=TIMEOUT_S))
        return self.joined

    def work(self, held: str = "") -> Assignment | Wait | Finished:
        request = pb.WorkRequest(run=self.joined.run, epoch=self.joined.epoch, client=self.name)
        return answer_from_wire(self.stub.Work(request, timeout=TIMEOUT_S))

    def fetch(self, digest: str, offset: int = 0) -> list[bytes]:
        request = pb.FetchRequest(
            run=self.joined.run, epoch=self.joined.epoch, client=self.name, digest=digest, offset=offset
        )
        return [chunk.data for chunk in self.stub.Fetch(request, timeout=TIMEOUT_S)]

    def update(self, assignment: Assignment, value: float = 1.0) -> tuple[pb.UpdateHeader, bytes]:
        derived = upload_schema(SCHEMA, assignment)
        delta = {spec.name: np.full(spec.shape, value, np.float32) for spec in derived.tensors}
        payload = codec("fp32").encode(derived, delta)
        digest = hashlib.sha256(payload).hexdigest()
        header = UpdateHeader(self.name, assignment.round, derived.digest, "fp32", len(payload), digest)
        return header_to_wire(header, self.joined.run, self.joined.epoch), payload

    def submit(self, header: pb.UpdateHeader, payload: bytes) -> bool:
        def parts() -> Iterator[pb.SubmitRequest]:
            yield pb.SubmitRequest(header=header)
            for start in range(0, len(payload), CHUNK_BYTES):
                yield pb.SubmitRequest(data=payload[start : start + CHUNK_BYTES])

        return self.stub.Submit(parts(), timeout=TIMEOUT_S).duplicate

    def leave(self) -> None:
        request = pb.LeaveRequest(run=self.joined.run, epoch=self.joined.epoch, client=self.name, reason="done")
        self.stub.Leave(request, timeout=TIMEOUT_S)


@contextmanager
def federation(folder: Path, run: RunConfig, *names: str, strategy: FedAvg | None = None) -> Iterator[list[Client]]:
    """Served clients that have joined and, all but the first, asked for work."""
    with Store(folder, durable=False) as store:
        made = coordinator(store, run, strategy)
        with serving(made, linger_s=0.0) as address:
            clients = [Client(address, name) for name in names]
            try:
                for client in clients:
                    client.join()
                for client in clients[1:]:
                    made.work(client.name, client.joined.run, client.joined.epoch)
                yield clients
            finally:
                for client in clients:
                    client.channel.close()


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert isinstance(caught.value, grpc.Call)
    return caught.value.code(), caught.value.details() or ""


def assigned(client: Client) -> Assignment:
    answer = client.work()
    assert isinstance(answer, Assignment)
    return answer


def test_two_clients_and_three_rounds_over_sockets(tmp_path: Path) -> None:
    finals: dict[str, bytes] = {}
    failures: list[BaseException] = []

    def life(client: Client) -> None:
        try:
            while not isinstance(answer := client.work(), Finished):
                if isinstance(answer, Assignment):
                    assert hashlib.sha256(b"".join(client.fetch(answer.broadcast_digest))).hexdigest() == (
                        answer.broadcast_digest
                    )
                    assert client.submit(*client.update(answer)) is False
            finals[client.name] = b"".join(client.fetch(answer.digest))
            client.leave()
        except BaseException as error:
            failures.append(error)

    with Store(tmp_path) as store:
        made = coordinator(store, config(3))
        with serving(made) as address:
            clients = [Client(address, name) for name in ("ann", "ben")]
            for client in clients:
                client.join()
            threads = [threading.Thread(target=life, args=(client,)) for client in clients]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for client in clients:
                client.channel.close()
        start = starting_adapter(SCHEMA, 0)

    assert not failures
    assert finals["ann"] == finals["ben"]
    tensors = codec("fp32").decode(SCHEMA, finals["ann"])
    np.testing.assert_allclose(tensors["m.A"], start["m.A"] + 3.0, rtol=1e-6)
    size = 4 * SCHEMA.size
    assert made.progress.bytes_by_round == {
        0: (2 * size, 2 * size),
        1: (2 * size, 2 * size),
        2: (2 * size, 2 * size),
        3: (2 * size, 0),
    }


def test_a_fetch_goes_on_from_an_offset(tmp_path: Path) -> None:
    with federation(tmp_path, config(), "ann", "ben") as (ann, _):
        digest = assigned(ann).broadcast_digest

        whole, rest = ann.fetch(digest), ann.fetch(digest, CHUNK_BYTES + 5)

        assert [len(chunk) for chunk in whole] == [CHUNK_BYTES, 4 * SCHEMA.size - CHUNK_BYTES]
        assert b"".join(whole)[CHUNK_BYTES + 5 :] == b"".join(rest)


def test_a_waiting_client_is_woken_when_the_round_opens(tmp_path: Path) -> None:
    with federation(tmp_path, config(), "ann") as (ann,):
        answers: list[object] = []
        waiting = threading.Thread(target=lambda: answers.append(ann.work()))
        waiting.start()
        ben = Client(ann.address, "ben")
        ben.join()
        assigned(ben)
        ben.channel.close()
        waiting.join(TIMEOUT_S)

        assert [type(answer) for answer in answers] == [Assignment]


def test_a_poll_that_waits_keeps_its_lease(tmp_path: Path) -> None:
    with federation(tmp_path, config(2, lease_s=1.0), "ann", "ben") as (ann, ben):
        ann.submit(*ann.update(assigned(ann)))
        late = ben.update(assigned(ben))
        answers: list[object] = []
        waiting = threading.Thread(target=lambda: answers.append(ann.work()))
        waiting.start()
        # Several leases long, Ben lives by heartbeats and Ann by nothing but her waiting poll.
        for _ in range(30):
            ben.stub.Heartbeat(pb.HeartbeatRequest(run=ben.joined.run, epoch=ben.joined.epoch, client="ben"))
            threading.Event().wait(0.1)
        ben.submit(*late)
        waiting.join(TIMEOUT_S)

        (answer,) = answers
        assert isinstance(answer, Assignment)
        assert answer.round == 1


def test_the_same_update_twice_gets_the_same_answer(tmp_path: Path) -> None:
    with federation(tmp_path, config(), "ann", "ben") as (ann, _):
        update = ann.update(assigned(ann))

        assert ann.submit(*update) is False
        assert ann.submit(*update) is True


@pytest.mark.parametrize(
    ("spoil", "code", "text"),
    [
        (lambda h, p: (h, p[:-1]), grpc.StatusCode.FAILED_PRECONDITION, "ended after 1279999 bytes"),
        (lambda h, p: (h, p + b"\0"), grpc.StatusCode.FAILED_PRECONDITION, "at least 1280001 bytes"),
        (lambda h, p: (h, b""), grpc.StatusCode.FAILED_PRECONDITION, "ended after 0 bytes"),
        (lambda h, p: (h, p[:-1] + b"\x7f"), grpc.StatusCode.FAILED_PRECONDITION, "digest"),
        (lambda h, p: (_with(h, epoch=9), p), grpc.StatusCode.FAILED_PRECONDITION, "epoch 9"),
        (lambda h, p: (_with(h, run="other"), p), grpc.StatusCode.FAILED_PRECONDITION, "'other'"),
        (lambda h, p: (_with(h, round=5), p), grpc.StatusCode.FAILED_PRECONDITION, "round 6"),
        (lambda h, p: (_with(h, client="eve"), p), grpc.StatusCode.FAILED_PRECONDITION, "'eve'"),
        (lambda h, p: (_with(h, codec="pickle"), p), grpc.StatusCode.INVALID_ARGUMENT, "unknown codec"),
        (lambda h, p: (_with(h, payload_bytes=1 << 32), p), grpc.StatusCode.FAILED_PRECONDITION, "announces"),
    ],
)
def test_a_submission_that_does_not_fit_is_refused_and_harms_nobody(
    tmp_path: Path,
    spoil: Callable[[pb.UpdateHeader, bytes], tuple[pb.UpdateHeader, bytes]],
    code: grpc.StatusCode,
    text: str,
) -> None:
    with federation(tmp_path, config(), "ann", "ben") as (ann, ben):
        header, payload = ann.update(assigned(ann))

        got, details = refused(lambda: ann.submit(*spoil(header, payload)))

        assert got is code
        assert text in details
        assert ann.submit(header, payload) is False
        assert ben.submit(*ben.update(assigned(ben))) is False
        assert isinstance(ann.work(), Finished)


def _with(header: pb.UpdateHeader, **changes: object) -> pb.UpdateHeader:
    other = pb.UpdateHeader()
    other.CopyFrom(header)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


@pytest.mark.parametrize("parts", [[], [pb.SubmitRequest(data=b"x")], [pb.SubmitRequest()]])
def test_a_submission_without_a_header_is_refused(tmp_path: Path, parts: list[pb.SubmitRequest]) -> None:
    with federation(tmp_path, config(), "ann") as (ann,):
        code, text = refused(lambda: ann.stub.Submit(iter(parts), timeout=TIMEOUT_S))

    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "starts with its header" in text


def test_a_second_header_is_refused(tmp_path: Path) -> None:
    with federation(tmp_path, config(), "ann", "ben") as (ann, _):
        header, _ = ann.update(assigned(ann))
        parts = [pb.SubmitRequest(header=header), pb.SubmitRequest(header=header)]

        code, text = refused(lambda: ann.stub.Submit(iter(parts), timeout=TIMEOUT_S))

    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "only payload may follow" in text


def test_a_message_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    with federation(tmp_path, config(), "ann", "ben") as (ann, _):
        header, payload = ann.update(assigned(ann))
        parts = [pb.SubmitRequest(header=header), pb.SubmitRequest(data=bytes(5 << 20))]

        code, _ = refused(lambda: ann.stub.Submit(iter(parts), timeout=TIMEOUT_S))

        assert code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION)
        assert ann.submit(header, payload) is False


def test_a_poisoned_update_is_out_of_range(tmp_path: Path) -> None:
    with federation(tmp_path, config(), "ann", "ben") as (ann, _):
        update = ann.update(assigned(ann), float("nan"))

        code, text = refused(lambda: ann.submit(*update))

    assert code is grpc.StatusCode.OUT_OF_RANGE
    assert "NaN" in text


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_maps_to_a_status_and_disk_errors_keep_their_text(name: str) -> None:
    kind: type[FedloomError] = getattr(errors, name)

    code, text = status_of(kind("told"))

    assert code is not grpc.StatusCode.UNKNOWN
    assert text == (INTERNAL if kind in (FedloomError, StoreError, StrategyError) else "told")


def test_the_text_of_an_unexpected_error_stays_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*asked: object) -> None:
        raise ValueError("/secret/path token=abc")

    with federation(tmp_path, config(), "ann", "ben") as (ann, _):
        monkeypatch.setattr(Coordinator, "work", broken)
        assert refused(ann.work) == (grpc.StatusCode.INTERNAL, INTERNAL)

    assert "token=abc" in caplog.text


def test_a_failing_disk_stops_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(store: Store, *events: Event) -> None:
        raise StoreError("disk gone")

    def serve_until_the_disk_fails() -> None:
        with federation(tmp_path, config(), "ann", "ben") as (ann, _):
            update = ann.update(assigned(ann))
            monkeypatch.setattr(Store, "append", fail)
            assert refused(lambda: ann.submit(*update)) == (grpc.StatusCode.INTERNAL, INTERNAL)

    with pytest.raises(StoreError, match="disk gone"):
        serve_until_the_disk_fails()


@pytest.mark.parametrize(
    ("listen", "text"),
    [
        ("0.0.0.0:0", "not a loopback address"),
        ("192.168.1.4:8765", "not a loopback address"),
        ("example.org:8765", "not a loopback address"),
        ("[::]:0", "not a loopback address"),
        ("127.0.0.1", "must be HOST:PORT"),
        ("127.0.0.1:http", "must be HOST:PORT"),
        ("127.0.0.1:65536", "must be HOST:PORT"),
    ],
)
def test_only_loopback_addresses_are_served(tmp_path: Path, listen: str, text: str) -> None:
    with Store(tmp_path, durable=False) as store:
        made = coordinator(store, config())

        with pytest.raises(ConfigError, match=text), serving(made, listen):
            pytest.fail("it is served")


def test_a_port_in_use_is_a_config_error(tmp_path: Path) -> None:
    with (
        Store(tmp_path / "one", durable=False) as one,
        Store(tmp_path / "two", durable=False) as two,
        serving(coordinator(one, config())) as address,
        pytest.raises(ConfigError, match="cannot listen"),
        serving(coordinator(two, config()), address),
    ):
        pytest.fail("it is served twice")


def test_a_finished_run_stops_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with federation(tmp_path, config(), "ann", "ben") as (ann, ben):
        ann.submit(*ann.update(assigned(ann)))
        ben.submit(*ben.update(assigned(ben)))

    assert "AdapterCommitted" in caplog.text
