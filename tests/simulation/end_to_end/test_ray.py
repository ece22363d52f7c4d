"""The Ray engine on real Ray: the adapter, the ledgers and the log of one process, whatever dies meanwhile."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from fedloom.client.data.rows import digest
from fedloom.client.privacy.dp_sgd.rng import Entropy
from fedloom.client.privacy.ledger.account import personal_folder
from fedloom.client.privacy.ledger.hash_chain import Charge
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.core.config.run import RunConfig
from fedloom.server.build import build_strategy
from fedloom.server.coordinator import Coordinator
from fedloom.server.storage.local import Store
from fedloom.simulation.federation import Federation, build, completed
from fedloom.simulation.in_process.engine import run_inprocess, standing_clock
from fedloom.simulation.ray_engine.cluster import ALONE
from fedloom.simulation.ray_engine.engine import run_ray
from fedloom.simulation.simulate import Watcher, simulate
from fedloom.strategies.start import starting_adapter
from tests.support.engines import entropy_of, largest_difference
from tests.support.runs import tiny_run

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """The address of a cluster of two nodes with a CPU each on this machine's loopback, and the first node's name."""
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    try:
        made.add_node(**size)
        made.wait_for_nodes()
        yield made.address, made.head_node.node_id
    finally:
        made.shutdown()


def config_of(base: Path, data: Path, **sections: dict[str, object]) -> RunConfig:
    """Three clients, two rounds, and each evaluates the result."""
    return tiny_run(
        base,
        rounds={"min_clients": 3},
        data={"source": str(data), "clients": 3},
        federated_evaluation={"enabled": True, "noise_multiplier": 2.0},
        **sections,
    )


@dataclass(frozen=True)
class Deadly:
    """A client's randomness, which ends the actor that asks for it and, later, a whole node: once each."""

    name: str
    head: str
    folder: Path

    def __call__(self, round: int) -> Entropy:
        import ray

        node = ray.get_runtime_context().get_node_id()
        (self.folder / f"{node}-{round}-{self.name}").touch()
        if round == 0 and self.name == "client-1" and self.first("actor"):
            os.kill(os.getpid(), signal.SIGKILL)
        if round == 1 and node != self.head and self.first("node"):
            os.kill(os.getppid(), signal.SIGKILL)
        until = time.monotonic() + 120
        while round == 1 and not (self.folder / "node").exists() and time.monotonic() < until:
            time.sleep(0.05)  # the other node is to have work in this round
        return entropy_of(self.name, round)

    def first(self, what: str) -> bool:
        try:
            (self.folder / what).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def accounts(federation: Federation) -> dict[str, list[Charge]]:
    """What each client was charged, and what it released for it; its ledger begins anew."""
    found: dict[str, list[Charge]] = {}
    for name, rows in federation.clients.items():
        folder = federation.policies[name].client.state / "ledger"
        with Ledger(folder, digest(rows)) as ledger:
            found[name] = [replace(charge, run="") for charge in ledger.charges()]
        shutil.rmtree(folder)
        shutil.rmtree(personal_folder(federation.policies[name]), ignore_errors=True)
    return found


def test_a_private_run_survives_an_actor_and_a_node_and_is_the_run_of_one_process(
    data: Path, tiny_base: Path, tmp_path: Path, cluster: tuple[str, str]
) -> None:
    address, head = cluster
    config = completed(
        config_of(
            tiny_base,
            data,
            adapter={"kind": "dual-lora", "rank": 4, "alpha": 8},  # half of it stays with its client
            strategy={"name": "feddpa"},
            privacy={"epsilon": 80.0, "delta": 1e-2},
            engine={"kind": "ray", "threads": 1, "address": address},
        )
    )
    federation = build(config, tmp_path / "run")
    schema = federation.model.schema
    starting = starting_adapter(schema, config.run.seed)
    marks = tmp_path / "marks"
    marks.mkdir()
    results, logs, charged = [], [], []
    for engine in ("inprocess", "ray"):
        with Store(tmp_path / engine, durable=False) as store:
            coordinator = Coordinator(
                config, schema, build_strategy(config), store, starting=starting, clock=standing_clock, expect=3
            )
            if engine == "inprocess":
                seams = {name: (lambda r, name=name: entropy_of(name, r)) for name in federation.clients}
                steps = run_inprocess(federation, coordinator, entropy=seams)  # type: ignore[arg-type]
            else:
                deadly = {name: Deadly(name, head, marks) for name in federation.clients}
                steps = run_ray(federation, coordinator, entropy=deadly)
            for _ in steps:
                pass
            assert coordinator.finished
            results.append(coordinator.result())
            # Who comes first is not the same; what is decided and what it comes to is.
            logs.append(sorted(repr(event) for event in store.events()[1:]))
        charged.append(accounts(federation))

    assert {path.name for path in marks.iterdir()} >= {"actor", "node"}, "or nothing has died"
    trained = {path.name.split("-")[0] for path in marks.glob("*-client-*")}
    assert len(trained) == 2, "both nodes have had clients"
    assert largest_difference(results[0], starting) > 1e-2
    assert largest_difference(*results) == 0.0
    assert logs[0] == logs[1]
    assert charged[0] == charged[1], "work that is begun again is charged once"
    assert {len(charges) for charges in charged[1].values()} == {3}, "two rounds and the result"


def test_an_open_run_on_ray_of_its_own_is_that_of_one_process_and_listens_on_loopback_only(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    listening: set[str] = set()

    def look(_: object) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                found = process.net_connections("inet")
            except psutil.Error:
                continue  # it has just ended
            listening.update(each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN)

    engine = {"kind": "ray", "threads": 1}
    one = simulate(config_of(tiny_base, data), tmp_path / "runs")
    two = simulate(config_of(tiny_base, data, engine=engine), tmp_path / "runs", Watcher(moved=look))

    adapters = [load_file(each.folder / "adapter" / "adapter_model.safetensors") for each in (one, two)]
    assert largest_difference(*adapters) == 0.0
    assert one.told == two.told
    assert listening
    assert {each.removeprefix("::ffff:") for each in listening} == {"127.0.0.1"}
    assert "RAY_AUTH_TOKEN" not in os.environ, "the token was for that run"
