"""What a strategy may express gives one result in one process, over gRPC and over Flower's nodes.

Corrections of frozen weights, a rank for each client, tensors that stay with it, tensors that take turns, and terms for
gradients; and, of private runs, a strategy that reads the noise and noise that is spread over steps.
"""

import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.client.data.rows import Rows, digest
from fedloom.client.privacy.ledger.account import personal_folder
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training.trainer import Trainer
from fedloom.flower.resident_trainer import Resident
from fedloom.proto.messages import Joined
from fedloom.server.coordinator import Coordinator
from fedloom.server.storage.local import Store
from fedloom.simulation.federation import Federation, build, completed
from fedloom.simulation.in_process.engine import run_inprocess
from fedloom.strategies.alternating.as_lora import ASLoRA
from fedloom.strategies.alternating.la_lora import LALoRA
from fedloom.strategies.api import Strategy
from fedloom.strategies.drift.feddyn import FedDyn
from fedloom.strategies.drift.scaffold import SCAFFOLD
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.personal.feddpa import FedDPA
from fedloom.strategies.personal.fedper import FedPer
from fedloom.strategies.personal.fedsa import FedSALoRA
from fedloom.strategies.ranks.hetlora import HetLoRA
from fedloom.strategies.stacking.flora import FLoRA
from fedloom.strategies.start import starting_adapter
from tests.flower.test_rounds import NAMES, Sites, coordinated
from tests.support.engines import entropy_of, largest_difference, over_sockets
from tests.support.runs import tiny_run, write_rows

RANKS = {name: rank + 1 for rank, name in enumerate(NAMES)}


@dataclass(frozen=True)
class Case:
    """A strategy and what its run has beside it."""

    strategy: Strategy
    sections: dict[str, Any] = field(default_factory=dict)


PRIVATE = {"enabled": True, "epsilon": 20.0, "delta": 1e-2}
CASES = [
    Case(FLoRA(ranks=RANKS)),
    Case(HetLoRA(ranks=RANKS)),
    Case(FedSALoRA()),
    Case(FedPer()),
    Case(FedSVD(refresh=1)),
    Case(LALoRA()),
    Case(SCAFFOLD()),
    Case(FedDyn()),
    Case(FedDPA(), {"adapter": {"kind": "dual-lora", "rank": 4, "alpha": 8}}),
    Case(ASLoRA(warmup=2), {"run": {"name": "tiny", "rounds": 4, "seed": 5}, "privacy": PRIVATE}),
    Case(FedSVD(), {"privacy": {**PRIVATE, "noise_bands": 2}}),
]


def federated(case: Case, folder: Path, base: Path, rows: Rows) -> Federation:
    """Three clients, two rounds or as many as the case says."""
    data = {"source": str(write_rows(folder / "data", rows)), "clients": 3}
    config = tiny_run(base, rounds={"min_clients": 3}, data=data, **case.sections)
    return build(completed(config, case.strategy), folder / "run")


def over_nodes(federation: Federation, coordinator: Coordinator, store: Store) -> None:
    sites = Sites({})
    for node, name in enumerate(reversed(NAMES)):

        def prepare(joined: Joined, name: str = name) -> Trainer:
            policy, rows = federation.policies[name], federation.clients[name]
            return Trainer(
                federation.model,
                rows,
                joined.spec,
                policy,
                Ledger(policy.client.state / "node-ledger", digest(rows)),  # the resident closes it
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join([type(case.strategy).__name__, *case.sections]))
def test_every_engine_gives_one_result(case: Case, tmp_path: Path, tiny_base: Path, rows: Rows) -> None:
    strategy, federation = case.strategy, federated(case, tmp_path, tiny_base, rows)
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
            assert coordinator.state.round == federation.config.run.rounds
            results[engine] = strategy.result(coordinator.state)
        for policy in federation.policies.values():  # an engine begins with nothing kept by another
            shutil.rmtree(personal_folder(policy), ignore_errors=True)

    first = results["one process"]
    assert max(float(np.abs(first[name] - starting[name]).max()) for name in starting) > 1e-2
    for engine, found in results.items():
        assert largest_difference(first, found) < 1e-5, engine
