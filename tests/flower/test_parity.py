"""A private run gives the same adapter in process and over nodes, whose messages cross as the bytes they are."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.data.rows import Rows, digest
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training.trainer import Trainer
from fedloom.flower.resident_trainer import Resident
from fedloom.proto.messages import Joined
from fedloom.server.build import build_strategy
from fedloom.server.coordinator import Coordinator
from fedloom.server.rounds.state import RoundClosed
from fedloom.server.storage.local import Store
from fedloom.simulation.federation import Federation, build, completed
from fedloom.simulation.in_process.engine import run_inprocess
from fedloom.strategies.start import starting_adapter
from tests.flower.test_rounds import NAMES, Sites, coordinated, coordinator_of
from tests.support.engines import entropy_of
from tests.support.runs import tiny_run, write_rows


@pytest.fixture
def federation(tmp_path: Path, tiny_base: Path, rows: Rows) -> Federation:
    """Three private clients, two rounds."""
    data = write_rows(tmp_path / "data", rows)
    config = tiny_run(
        tiny_base,
        privacy={"epsilon": 50.0, "delta": 1e-2, "noise_multiplier": 1.0},
        strategy={"name": "fedsvd", "weighting": "examples"},
        rounds={"min_clients": 3},
        data={"source": str(data), "clients": 3},
    )
    return build(completed(config), tmp_path / "run")


@pytest.fixture
def sites(federation: Federation) -> Iterator[Sites]:
    """A resident for each client, at nodes whose numbers are in another order than the names."""
    made = Sites({})
    for node, name in enumerate(reversed(NAMES)):

        def prepare(joined: Joined, name: str = name) -> Trainer:
            policy, rows = federation.policies[name], federation.clients[name]
            ledger = Ledger(policy.client.state / "flower-ledger", digest(rows))
            seam = partial(entropy_of, name)
            return Trainer(federation.model, rows, joined.spec, policy, ledger, entropy_for=seam)

        policy = federation.policies[name]
        made.residents[node] = Resident(policy, prepare, policy.client.state / "spool")
    made.up = set(made.residents)
    yield made
    for resident in made.residents.values():
        resident.close()


def test_a_private_run_is_the_same_in_process_and_over_nodes(
    federation: Federation, sites: Sites, tmp_path: Path
) -> None:
    config, schema = federation.config, federation.model.schema
    starting = starting_adapter(schema, config.run.seed)
    with Store(tmp_path / "inprocess", durable=False) as store:
        coordinator = Coordinator(config, schema, build_strategy(config), store, starting=starting, expect=3)
        seams = {name: partial(entropy_of, name) for name in federation.clients}
        for _ in run_inprocess(federation, coordinator, entropy=seams):  # type: ignore[arg-type]
            pass
        expected = coordinator.state.adapter

    with Store(tmp_path / "nodes", durable=False) as store:
        adapter = coordinated(sites, coordinator_of(config, schema, store), store)
        closed = [event.clients for event in store.events() if isinstance(event, RoundClosed)]

    assert max(float(np.abs(expected[name] - starting[name]).max()) for name in expected) > 1e-2
    assert max(float(np.abs(expected[name] - adapter[name]).max()) for name in expected) < 1e-5
    assert closed == [NAMES] * 2
    assert [request.over for _, request in sites.asked[-3:]] == [True] * 3
    assert not list((tmp_path / "run").rglob("*.update")), "at the end nothing waits to be sent again"
