"""What a strategy may express gives one result in one process, over gRPC and over Flower's nodes.

Corrections of frozen weights, a rank for each client, tensors that stay with it, tensors that take turns, and terms for
gradients.
"""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.data.rows import Rows
from fedloom.client.privacy.ledger.account import personal_folder
from fedloom.client.training.trainer import Trainer
from fedloom.flower.resident_trainer import Resident
from fedloom.proto.messages import Joined
from fedloom.server.coordinator import Coordinator
from fedloom.server.storage.local import Store
from fedloom.simulation.federation import Federation, build, completed
from fedloom.simulation.inprocess import run_inprocess
from fedloom.strategies.alternating.la_lora import LALoRA
from fedloom.strategies.api import Strategy
from fedloom.strategies.drift.feddyn import FedDyn
from fedloom.strategies.drift.scaffold import SCAFFOLD
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.personal.fedsa import FedSALoRA
from fedloom.strategies.ranks.hetlora import HetLoRA
from fedloom.strategies.stacking.flora import FLoRA
from fedloom.strategies.start import starting_adapter
from tests.flower.test_rounds import NAMES, Sites, coordinated
from tests.support.engines import entropy_of, largest_difference, over_sockets
from tests.support.runs import tiny_run, write_rows

RANKS = {name: rank + 1 for rank, name in enumerate(NAMES)}


@pytest.fixture
def federation(tmp_path: Path, tiny_base: Path, rows: Rows) -> Federation:
    """Three clients, two rounds, not private."""
    data = write_rows(tmp_path / "data", rows)
    config = tiny_run(tiny_base, rounds={"min_clients": 3}, data={"source": str(data), "clients": 3})
    return build(completed(config), tmp_path / "run")


def over_nodes(federation: Federation, coordinator: Coordinator, store: Store) -> None:
    sites = Sites({})
    for node, name in enumerate(reversed(NAMES)):

        def prepare(joined: Joined, name: str = name) -> Trainer:
            policy = federation.policies[name]
            return Trainer(
                federation.model,
                federation.clients[name],
                joined.spec,
                policy,
                None,
                personal=personal_folder(policy),
                entropy_for=partial(entropy_of, name),
            )

        policy = federation.policies[name]
        sites.residents[node] = Resident(policy, prepare, policy.client.state / "node-spool")
    sites.up = set(sites.residents)
    try:
        coordinated(sites, coordinator, store)
    finally:
        for resident in sites.residents.values():
            resident.close()


@pytest.mark.parametrize(
    "strategy",
    [FLoRA(ranks=RANKS), HetLoRA(ranks=RANKS), FedSALoRA(), FedSVD(refresh=1), LALoRA(), SCAFFOLD(), FedDyn()],
    ids=lambda strategy: type(strategy).__name__,
)
def test_every_engine_gives_one_result(strategy: Strategy, federation: Federation, tmp_path: Path) -> None:
    schema = federation.model.schema
    starting = starting_adapter(schema, 0)
    seams = {name: partial(entropy_of, name) for name in NAMES}
    results = {}
    for engine in ("one process", "sockets", "nodes"):
        with Store(tmp_path / engine, durable=False) as store:
            coordinator = Coordinator(federation.config, schema, strategy, store, starting=starting, expect=3)
            if engine == "one process":
                for _ in run_inprocess(federation, coordinator, entropy=seams):  # type: ignore[arg-type]
                    pass
            elif engine == "sockets":
                over_sockets(federation, coordinator)
            else:
                over_nodes(federation, coordinator, store)
            assert coordinator.state.round == 2
            results[engine] = strategy.result(coordinator.state)
        for policy in federation.policies.values():  # an engine begins with nothing kept by another
            shutil.rmtree(personal_folder(policy), ignore_errors=True)

    first = results["one process"]
    assert max(float(np.abs(first[name] - starting[name]).max()) for name in starting) > 1e-2
    for engine, found in results.items():
        assert largest_difference(first, found) < 1e-5, engine
