"""A client behind a bad line: every byte goes through a proxy that cuts, garbles or forgets as told."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from fedloom.client.policy import Policy
from fedloom.client.session.heartbeat import Timing
from fedloom.client.session.participant import Participant
from fedloom.client.transport import grpc as connection_module
from fedloom.client.transport import tls as channel_module
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ProtocolError, Unavailable
from fedloom.core.limits import CHUNK_BYTES
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.proto.frames import SERVICE
from fedloom.proto.messages import Assignment, Finished, Joined, UpdateHeader, upload_schema
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc import server as serve_module
from fedloom.server.rpc.server import serving
from fedloom.server.rpc.uploads import Upload, Uploads
from fedloom.server.storage.local import Store
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter
from tests.faults import FaultProxy, fault_proxy
from tests.support.trainers import Steady

SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (8, 65_000)), TensorSpec("m.B", "m", Role.LORA_B, (65_000, 8))))
PAYLOAD_BYTES = 4 * SCHEMA.size
assert 3.9 * CHUNK_BYTES < PAYLOAD_BYTES < 4 * CHUNK_BYTES
SLACK_BYTES = CHUNK_BYTES // 2
"""Room for calls without a payload, and for HTTP/2's own frames."""


def coordinator(store: Store, clients: int = 1, rounds: int = 1) -> Coordinator:
    run = RunConfig.model_validate(
        {
            "run": {"name": "lines", "rounds": rounds},
            "model": {"base": "none", "labels": ["a", "b"]},
            "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
            "privacy": {"enabled": False},
            "rounds": {"min_clients": clients},
            "wire": {"upload": "fp32", "broadcast": "fp32"},
        }
    )
    return Coordinator(run, SCHEMA, FedAvg(), store, starting=starting_adapter(SCHEMA, 0))


def site(address: str, name: str = "ann") -> Participant:
    policy = Policy.model_validate(
        {"client": {"name": name}, "data": {"source": "none"}, "privacy": {"allow_non_private": True}}
    )

    def prepare(_: Joined) -> Steady:
        return Steady(SCHEMA)

    return Participant(GrpcConnection(address), policy, prepare, timing=Timing(backoff_s=(0.02, 0.2)))


def life(participant: Participant, ends: list[Finished]) -> threading.Thread:
    """A thread in which the client lives until the run is over."""

    def run() -> None:
        try:
            ends.append(participant.run(patience_s=60))
        finally:
            connection = participant.connection
            assert isinstance(connection, GrpcConnection)
            connection.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def moved(made: Coordinator, by: float) -> None:
    """Every value of the adapter has moved by so much since the start: each round once, none twice."""
    start = starting_adapter(SCHEMA, 0)
    assert made.finished
    for name, tensor in made.state.adapter.items():
        np.testing.assert_allclose(tensor, start[name] + by, rtol=0, atol=1e-6)


@contextmanager
def behind_proxy(folder: Path) -> Iterator[tuple[Coordinator, FaultProxy]]:
    with Store(folder, durable=False) as store:
        made = coordinator(store)
        with serving(made) as address, fault_proxy(address) as proxy:
            yield made, proxy


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each chunk of payload that either side has taken out of its buffers."""
    read: list[int] = []
    add, take = Uploads.add, connection_module._Download.take

    def added(uploads: Uploads, upload: Upload, turn: int, data: memoryview) -> None:
        add(uploads, upload, turn, data)
        read.append(len(data))

    def taken(download: connection_module._Download, chunk: memoryview) -> None:
        take(download, chunk)
        read.append(len(chunk))

    monkeypatch.setattr(Uploads, "add", added)
    monkeypatch.setattr(connection_module._Download, "take", taken)
    return read


DOWN_CHUNKS = 4
"""Chunks of the broadcast, which comes before any upload."""


def test_an_upload_whose_line_is_cut_goes_on_where_it_stopped(tmp_path: Path, chunks: list[int]) -> None:
    ends: list[Finished] = []
    with behind_proxy(tmp_path) as (made, proxy):
        proxy.faults.cut_when = lambda: len(chunks) >= DOWN_CHUNKS + proxy.connections
        proxy.faults.cuts_up.extend([int(1.5 * CHUNK_BYTES), int(1.5 * CHUNK_BYTES)])
        life(site(proxy.address), ends).join()

        moved(made, 1.0)
        assert proxy.connections == 3
        # Each cut costs half a chunk, the one it falls into, and not what came before.
        assert PAYLOAD_BYTES < proxy.up_bytes < PAYLOAD_BYTES + CHUNK_BYTES + SLACK_BYTES


def test_a_download_whose_line_is_cut_goes_on_where_it_stopped(tmp_path: Path, chunks: list[int]) -> None:
    ends: list[Finished] = []
    with behind_proxy(tmp_path) as (made, proxy):
        proxy.faults.cut_when = lambda: len(chunks) >= proxy.connections
        proxy.faults.cuts_down.extend([int(1.5 * CHUNK_BYTES), int(1.5 * CHUNK_BYTES)])
        life(site(proxy.address), ends).join()

        moved(made, 1.0)
        assert proxy.connections == 3
        assert PAYLOAD_BYTES < proxy.down_bytes < PAYLOAD_BYTES + CHUNK_BYTES + SLACK_BYTES


def test_a_garbled_upload_is_sent_again_from_the_start(tmp_path: Path) -> None:
    ends: list[Finished] = []
    with behind_proxy(tmp_path) as (made, proxy):
        proxy.faults.flips_up.append(2 * CHUNK_BYTES)
        life(site(proxy.address), ends).join()

        moved(made, 1.0)
        assert proxy.up_bytes > 2 * PAYLOAD_BYTES


def test_a_half_done_upload_goes_on_after_a_restart_of_the_coordinator(tmp_path: Path, chunks: list[int]) -> None:
    ends: list[Finished] = []
    with ExitStack() as first, ExitStack() as second:
        store = first.enter_context(Store(tmp_path, durable=False))
        proxy = second.enter_context(fault_proxy(first.enter_context(serving(coordinator(store)))))
        proxy.faults.cuts_up.append(int(2.5 * CHUNK_BYTES))
        proxy.faults.cut_when = lambda: len(chunks) >= DOWN_CHUNKS + 2
        proxy.faults.cuts_up.extend([0] * 1000)  # no other connection gets a byte through
        thread = life(site(proxy.address), ends)
        wait_for(lambda: [path.stat().st_size for path in (tmp_path / "uploads").glob("*")] == [2 * CHUNK_BYTES])
        before = proxy.up_bytes
        first.close()  # the coordinator stops while the client goes on trying
        made = coordinator(second.enter_context(Store(tmp_path, durable=False)))
        proxy.upstream = second.enter_context(serving(made))
        proxy.faults.cuts_up.clear()
        thread.join()
        moved(made, 1.0)
        assert proxy.up_bytes - before < PAYLOAD_BYTES - 2 * CHUNK_BYTES + SLACK_BYTES
    assert len(ends) == 1
    assert list((tmp_path / "uploads").iterdir()) == []


def wait_for(happened: Callable[[], bool]) -> None:
    while not happened():
        threading.Event().wait(0.02)


def test_a_proxy_that_cuts_idle_lines_costs_connections_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaled-down case of a hospital: everything through HTTP CONNECT, and silence is cut."""
    ends: list[Finished] = []
    with Store(tmp_path, durable=False) as store, fault_proxy() as proxy:
        made = coordinator(store, clients=2, rounds=2)
        with serving(made) as address:
            monkeypatch.setenv("grpc_proxy", f"http://{proxy.address}")
            monkeypatch.setenv("no_grpc_proxy", "")
            proxy.faults.idle_s = 0.3
            ann = life(site(address), ends)
            while proxy.connections < 6:  # she waits in long polls, which are cut
                threading.Event().wait(0.05)
            ben = life(site(address, "ben"), ends)
            for thread in (ann, ben):
                thread.join()

        moved(made, 2.0)
        assert [end.rounds for end in ends] == [2, 2]
        assert set(proxy.targets) == {address}
        assert len(proxy.targets) == proxy.connections >= 5


def test_a_silent_line_is_kept_open_by_pings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a twentieth of real times: a proxy that cuts after 10 s of silence, in a poll that lasts longer."""
    ours, theirs = dict(channel_module._OPTIONS), dict(serve_module.OPTIONS)
    ping, least = "grpc.keepalive_time_ms", "grpc.http2.min_recv_ping_interval_without_data_ms"
    assert theirs[least] < ours[ping] < 10_000
    monkeypatch.setattr(channel_module, "_OPTIONS", [*(ours | {ping: ours[ping] // 20}).items()])
    monkeypatch.setattr(serve_module, "OPTIONS", (*(theirs | {least: theirs[least] // 20}).items(),))
    ends: list[Finished] = []
    with Store(tmp_path, durable=False) as store, fault_proxy() as proxy:
        made = coordinator(store, clients=2)
        with serving(made) as address:
            monkeypatch.setenv("grpc_proxy", f"http://{proxy.address}")
            monkeypatch.setenv("no_grpc_proxy", "")
            ann = life(site(address), ends)
            wait_for(lambda: bool(made.progress.live))
            proxy.faults.idle_s = 1.5
            threading.Event().wait(4.0)
            assert proxy.connections == 1
            proxy.faults.idle_s = None
            ben = life(site(address, "ben"), ends)
            for thread in (ann, ben):
                thread.join()

        assert len(ends) == 2


def test_a_client_outlives_resets_refusals_and_dead_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_CALL_S", 1.0)
    monkeypatch.setattr(connection_module, "LONG_POLL_S", -9.0)  # a poll over a dead line is given up after 1 s
    ends: list[Finished] = []
    with Store(tmp_path, durable=False) as store:
        made = coordinator(store, clients=2)
        with serving(made) as address, fault_proxy(address) as proxy:
            ann = life(site(proxy.address), ends)
            for fault in (proxy.reset, lambda: setattr(proxy.faults, "refuse", True), proxy.reset, proxy.half_open):
                while not made.progress.live:
                    threading.Event().wait(0.02)
                threading.Event().wait(0.1)
                fault()
                threading.Event().wait(0.3)
                proxy.faults.refuse = False
            proxy.faults.blackhole = True
            threading.Event().wait(1.5)
            proxy.faults.blackhole = False
            proxy.reset()
            ben = life(site(address, "ben"), ends)
            for thread in (ann, ben):
                thread.join()

        moved(made, 1.0)
        assert len(ends) == 2


def test_what_came_of_another_payload_is_not_mixed_in(tmp_path: Path) -> None:
    with behind_proxy(tmp_path) as (_, proxy):
        line = GrpcConnection(proxy.address)
        proxy.faults.cuts_up.append(int(1.5 * CHUNK_BYTES))
        line.join("ann", 0)
        order = line.work()
        assert isinstance(order, Assignment)
        schema = upload_schema(SCHEMA, order)
        first, second = (np.full(schema.size, value, np.float32).tobytes() for value in (1.0, 2.0))
        headers = [
            UpdateHeader("ann", 0, schema.digest, "fp32", len(body), hashlib.sha256(body).hexdigest())
            for body in (first, second)
        ]
        with pytest.raises(Unavailable):
            line.submit(headers[0], first)

        while True:
            try:
                line.join("ann", 0)
                break
            except Unavailable:
                continue
        assert line.submit(headers[1], second) is False
        assert proxy.up_bytes > PAYLOAD_BYTES + CHUNK_BYTES
        line.close()


def test_a_coordinator_that_knows_no_offsets_gets_the_whole_update_again() -> None:
    """One of an earlier build: it takes a header with an offset for one without, and misses the rest."""
    sizes: list[int] = []
    body = bytes(3 * CHUNK_BYTES)
    header = UpdateHeader("ann", 0, "ab" * 32, "fp32", len(body), hashlib.sha256(body).hexdigest())

    def submit(parts: Iterator[pb.SubmitRequest], context: grpc.ServicerContext) -> pb.SubmitReply:
        sizes.append(sum(len(part.data) for part in parts))
        if len(sizes) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the line broke")
        if sizes[-1] < len(body):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the payload ended early")
        return pb.SubmitReply()

    method = grpc.stream_unary_rpc_method_handler(
        submit,
        request_deserializer=pb.SubmitRequest.FromString,
        response_serializer=pb.SubmitReply.SerializeToString,
    )
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Submit": method}),))
    line = GrpcConnection(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    server.start()
    with pytest.raises(Unavailable):
        line.submit(header, body)
    with pytest.raises(ProtocolError, match="ended early"):  # upon which the participant joins and tries again
        line.submit(header, body)

    assert line.submit(header, body) is False
    assert sizes == [len(body), 0, len(body)]
    line.close()
    server.stop(None).wait()
