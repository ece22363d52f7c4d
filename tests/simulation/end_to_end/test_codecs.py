"""A private federation under each codec: the engines agree, clients fetch changes, and a coordinator that is killed
goes on with the same bytes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.client.privacy.ledger.account import personal_folder
from fedloom.core.codecs import codec
from fedloom.core.config.run import RunConfig, WireSection
from fedloom.server.build import build_strategy
from fedloom.server.coordinator import Coordinator
from fedloom.server.storage.local import Store
from fedloom.simulation.federation import Federation, build, completed
from fedloom.simulation.in_process.engine import run_inprocess, standing_clock
from fedloom.strategies.start import starting_adapter
from tests.support.engines import entropy_of, largest_difference, over_sockets
from tests.support.runs import tiny_run

ROUNDS = 3
TRAINED = {"fedavg": {"lora_A", "lora_B", "head"}, "ffa": {"lora_B", "head"}, "fedsvd": {"lora_B", "head"}}


@pytest.fixture
def config(data: Path, tiny_base: Path) -> RunConfig:
    """Three clients, three private rounds."""
    return tiny_run(
        tiny_base,
        run={"name": "tiny", "rounds": ROUNDS, "seed": 5},
        privacy={"enabled": True, "epsilon": 20.0, "delta": 1e-2},
        rounds={"min_clients": 3},
        data={"source": str(data), "clients": 3},
    )


def settled(config: RunConfig, strategy: str, name: str) -> RunConfig:
    """The run with this strategy and codec, both ways."""
    chosen = config.strategy.model_copy(update={"name": strategy})
    return completed(config.model_copy(update={"strategy": chosen, "wire": WireSection(upload=name, broadcast=name)}))


def opened(federation: Federation, store: Store) -> Coordinator:
    run, schema = federation.config, federation.model.schema
    starting = starting_adapter(schema, run.run.seed)
    return Coordinator(run, schema, build_strategy(run), store, starting=starting, clock=standing_clock, expect=3)


def in_process(federation: Federation, coordinator: Coordinator, rounds: int = ROUNDS) -> None:
    """Clients take turns until so many rounds are committed."""
    seams: Any = {name: (lambda r, name=name: entropy_of(name, r)) for name in federation.clients}
    for _ in run_inprocess(federation, coordinator, entropy=seams):
        if rounds < ROUNDS and coordinator.state.round == rounds:
            break


def forget(federation: Federation) -> None:
    """Clients begin anew."""
    for policy in federation.policies.values():
        shutil.rmtree(personal_folder(policy), ignore_errors=True)


@pytest.mark.parametrize(
    ("strategy", "name"),
    [("fedavg", "eden2"), ("fedsvd", "eden1"), ("ffa", "int8"), ("fedavg", "top10"), ("ffa", "bf16")],
)
def test_engines_agree_and_clients_fetch_changes(config: RunConfig, tmp_path: Path, name: str, strategy: str) -> None:
    federation = build(settled(config, strategy, name), tmp_path / "run")
    schema, results = federation.model.schema, []
    for engine in ("inprocess", "grpc"):
        with Store(tmp_path / engine, durable=False) as store:
            coordinator = opened(federation, store)
            if engine == "inprocess":
                in_process(federation, coordinator)
            else:
                over_sockets(federation, coordinator)
            results.append(coordinator.state.adapter)
            traffic = coordinator.progress.bytes_by_round
        forget(federation)
        uploaded = 3 * codec(name).encoded_size(schema.select(TRAINED[strategy]))
        assert {up for _, up in traffic.values()} == {uploaded}
        assert traffic[0][0] == 3 * 4 * schema.size, "who has nothing gets the whole"
        assert traffic[2][0] == uploaded, "a change has the length of an update"

    assert largest_difference(results[0], starting_adapter(schema, 5)) > 1e-2
    assert largest_difference(*results) < 1e-5


@pytest.mark.parametrize("name", ["eden2", "int8", "top10"])
def test_a_run_that_resumes_ends_with_the_same_bytes(config: RunConfig, tmp_path: Path, name: str) -> None:
    """Its clients have lost what they held with their processes: they fetch the whole, which is the same."""
    run = settled(config, "fedsvd", name)
    federation = build(run, tmp_path / "run")
    with Store(tmp_path / "one", durable=False) as store:
        in_process(federation, uninterrupted := opened(federation, store))

    federation = build(run, tmp_path / "again")
    with Store(tmp_path / "two", durable=False) as store:
        in_process(federation, opened(federation, store), rounds=1)
    with Store(tmp_path / "two", durable=False) as store:
        in_process(federation, resumed := opened(federation, store))

    assert resumed.state.round == ROUNDS
    for field in ("adapter", "memory"):
        one, two = getattr(uninterrupted.state, field), getattr(resumed.state, field)
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[key], two[key]) for key in one)


ELSEWHERE: dict[str, dict[str, Any]] = {
    "user-level": {
        "user_level": {"enabled": True, "epsilon": 1e4, "delta": 1e-3, "clip_norm": 0.5, "cohort": 3},
        "privacy": {"enabled": False},
        "strategy": {"name": "ffa"},
    },
    "buffered": {"rounds": {"mode": "buffered", "clients_per_round": 3, "min_clients": 2}},
    "a median": {"strategy": {"name": "median"}},
    "bounded": {"strategy": {"name": "fedavg", "norm_bound": 0.5}},
}


@pytest.mark.parametrize("how", ELSEWHERE)
def test_rules_see_what_is_decoded(config: RunConfig, tmp_path: Path, how: str) -> None:
    """With four bits a run ends near the one without a codec: nearer by far than it has moved."""
    sections = config.model_dump(mode="json", exclude_none=True) | ELSEWHERE[how]
    ends = {}
    for name in ("fp32", "eden4"):
        run = completed(RunConfig.model_validate(sections | {"wire": {"upload": name, "broadcast": name}}))
        federation = build(run, tmp_path / name / "run")
        with Store(tmp_path / name / "state", durable=False) as store:
            in_process(federation, coordinator := opened(federation, store))
            assert coordinator.state.round == ROUNDS
            ends[name] = coordinator.state.adapter
        forget(federation)

    begin = starting_adapter(federation.model.schema, 5)
    moved, apart = (
        sum(float(np.square(ends["fp32"][key] - other[key]).sum()) for key in begin) for other in (begin, ends["eden4"])
    )
    assert 0 < apart < 0.1 * moved
