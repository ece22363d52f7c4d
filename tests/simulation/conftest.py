"""A data set for small simulations; a coordinator with certificates, and members of it."""

import csv
import datetime as dt
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedloom.client.data.rows import Rows
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.config.run import RunConfig
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.core.security.subject import Identity, MemberRole
from fedloom.proto.messages import Assignment
from fedloom.server.auth import ca as authority_module
from fedloom.server.auth.ca import Authority, create
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.server import serving
from fedloom.server.storage.local import Store
from fedloom.simulation.credentials import enrolled
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter

# Some megabytes, more than a connection buffers, so that a download nobody reads stays under way.
SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (8, 2**19)), TensorSpec("m.B", "m", Role.LORA_B, (2**19, 8))))


@pytest.fixture
def data(tmp_path: Path, rows: Rows) -> Path:
    """A folder with train.csv and test.csv."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, part in (("train", range(30)), ("test", range(30, 40))):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([rows.texts[i], rows.label_names[rows.labels[i]]] for i in part)
    return folder


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    create(tmp_path / "certs", [])
    return tmp_path / "certs"


@pytest.fixture
def authority(certs: Path) -> Iterator[Authority]:
    made = Authority(certs)
    yield made
    made.close()


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Coordinator]:
    config = RunConfig.model_validate(
        {
            "run": {"name": "trial", "rounds": 1},
            "model": {"base": "tiny", "labels": ["no", "yes"]},
            "train": {"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1},
            "rounds": {"min_clients": 2},
            "wire": {"upload": "fp32", "broadcast": "fp32"},
        }
    )
    with Store(tmp_path / "state", durable=False) as store:
        yield Coordinator(config, SCHEMA, FedAvg(), store, starting=starting_adapter(SCHEMA, 0))


@pytest.fixture
def address(certs: Path, made: Coordinator) -> Iterator[str]:
    with serving(made, certs=certs, linger_s=0.0) as bound:
        yield bound


@pytest.fixture
def connect(address: str) -> Iterator[Callable[[Path], GrpcConnection]]:
    made: list[GrpcConnection] = []

    def connect(folder: Path) -> GrpcConnection:
        made.append(GrpcConnection(address, folder))
        return made[-1]

    yield connect
    for connection in made:
        connection.close()


@pytest.fixture
def both_ask(made: Coordinator) -> Callable[[GrpcConnection], Assignment]:
    """Open the round: Ben asks behind the scenes, Ann over her line."""

    def ask(connection: GrpcConnection) -> Assignment:
        joined = made.join("ben", 1, 0)
        made.work("ben", joined.run, joined.epoch)
        connection.join("ann", 0)
        answer = connection.work()
        assert isinstance(answer, Assignment)
        return answer

    return ask


@pytest.fixture
def short_lived(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, float], Path]:
    """Ann's folder of certificates, which end so many seconds from now."""

    def make(folder: Path, life_s: float) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(authority_module, "_SKEW", dt.timedelta(days=30, seconds=-life_s))
            return enrolled(authority, Identity(MemberRole.CLIENT, "ann"), folder)

    return make
