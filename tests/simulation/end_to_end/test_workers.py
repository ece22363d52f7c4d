"""Clients that train at once in one process give bit for bit what they give in turn."""

import gc
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.load import load_model
from fedloom.client.privacy.ledger.account import personal_folder
from fedloom.core.config.run import AdapterSection, ModelSection, RunConfig
from fedloom.core.errors import ConfigError
from fedloom.core.schema import Tensors
from fedloom.server.build import build_strategy
from fedloom.server.coordinator import Coordinator
from fedloom.server.rounds.state import Event
from fedloom.server.storage.local import Store
from fedloom.simulation.federation import build, completed
from fedloom.simulation.in_process.engine import run_inprocess, standing_clock
from fedloom.simulation.in_process.workers import number_of_workers, working
from fedloom.strategies.start import starting_adapter
from tests.support.engines import entropy_of, largest_difference
from tests.support.runs import tiny_run

LORA = {"kind": "lora", "rank": 4, "alpha": 8}


def config_of(base: Path, data: Path, /, **sections: Any) -> RunConfig:
    """A run of five clients."""
    given: dict[str, Any] = {
        "privacy": {"epsilon": 80.0, "delta": 1e-2},
        "rounds": {"min_clients": 5},
        "data": {"source": str(data), "clients": 5},
    }
    return completed(tiny_run(base, **given | sections))


def trained(config: RunConfig, folder: Path, workers: int) -> tuple[Tensors, list[Event]]:
    """The result of a run, and its log but for the order of what clients do."""
    engine = config.engine.model_copy(update={"workers": workers})
    config = config.model_copy(update={"engine": engine})
    federation = build(config, folder / "run")
    schema = federation.model.schema
    starting = starting_adapter(schema, config.run.seed)
    with Store(folder / f"state-{workers}", durable=False) as store:
        coordinator = Coordinator(
            config, schema, build_strategy(config), store, starting=starting, clock=standing_clock, expect=5
        )
        seams = {name: (lambda r, name=name: entropy_of(name, r)) for name in federation.clients}
        for _ in run_inprocess(federation, coordinator, entropy=seams):  # type: ignore[arg-type]
            pass
        assert coordinator.finished
        result, events = coordinator.result(), store.events()[1:]
    for policy in federation.policies.values():
        shutil.rmtree(policy.client.state / "ledger", ignore_errors=True)
        shutil.rmtree(personal_folder(policy), ignore_errors=True)
    assert largest_difference({name: result[name] for name in starting}, starting) > 1e-3
    return result, sorted(events, key=repr)


@pytest.mark.parametrize(
    "sections",
    [
        {"strategy": {"name": "fedsvd"}},
        {"strategy": {"name": "fedavg"}, "privacy": {"enabled": False}},
        # What these keep beside the adapter lies in the frozen weights, which the workers share.
        {"strategy": {"name": "fedex"}, "privacy": {"enabled": False}},
        {"strategy": {"name": "feddpa"}, "adapter": {**LORA, "kind": "dual-lora"}},
        {"strategy": {"name": "fedavg"}, "adapter": {**LORA, "layers": [-1]}},
        {"strategy": {"name": "fedavg"}, "secure_aggregation": {"enabled": True, "max_clients": 5}},
    ],
    ids=["private", "open", "corrections", "personal", "frozen-prefix", "secure"],
)
def test_workers_give_what_turns_give(tiny_base: Path, data: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    config = config_of(tiny_base, data, **sections)
    in_turn, log = trained(config, tmp_path, 1)
    at_once, other = trained(config, tmp_path, 3)

    assert largest_difference(in_turn, at_once) == 0.0
    assert [repr(event) for event in log] == [repr(event) for event in other]


class Committing:
    """A participant whose turn commits a round."""

    def __init__(self, name: str, state: SimpleNamespace, turns: list[str]) -> None:
        self.name, self._state, self._turns = name, state, turns

    def step(self) -> None:
        self._turns.append(self.name)
        self._state.round += 1


def test_a_commit_is_looked_at_before_anybody_else_begins(tiny_model: AdapterModel) -> None:
    state, begun = SimpleNamespace(round=0), list[str]()
    participants = [Committing(name, state, begun) for name in ("a", "b", "c")]
    trainers = {each.name: SimpleNamespace(use=lambda *_: None) for each in participants}
    with working(tiny_model, 1, 1, trainers) as workers:  # type: ignore[arg-type]
        for at, name in enumerate(("a", "b", "c")):
            turns = workers.turns(participants[at:], SimpleNamespace(state=state))  # type: ignore[arg-type]
            assert [participant.name for participant, _ in turns] == [name]
    assert begun == ["a", "b", "c"]


def test_a_twin_has_an_adapter_and_corrections_of_its_own_on_the_same_memory(tiny_base: Path) -> None:
    spec = ModelSection(base=str(tiny_base), labels=("no", "yes"), head="train")
    model = load_model(spec, AdapterSection(kind="lora", rank=4, alpha=8.0))
    other = model.twin()
    pair = model.schema.pairs[0]
    name = f"base_model.model.{pair.module}"

    def weight(of: AdapterModel) -> torch.Tensor:
        layer: Any = of.model.get_submodule(name)
        found: torch.Tensor = layer.base_layer.weight
        return found

    assert weight(model).data_ptr() == weight(other).data_ptr()
    before = model.read(model.schema)
    pretrained = weight(model).clone()
    rng = np.random.default_rng(0)
    change = {each: rng.normal(size=value.shape).astype(np.float32) for each, value in before.items()}
    out, into = pretrained.shape
    a, b = rng.normal(size=(2, into)).astype(np.float32), rng.normal(size=(out, 2)).astype(np.float32)
    other.show({**change, f"{pair.module}.base_A": a, f"{pair.module}.base_B": b})

    assert largest_difference(model.read(model.schema), before) == 0.0
    assert torch.equal(weight(model), pretrained)
    expected = pretrained.numpy() + model.schema.scale * (b @ a)
    np.testing.assert_allclose(weight(other).numpy(), expected, rtol=1e-5, atol=1e-5)
    assert largest_difference(other.read(model.schema), change) == 0.0
    other.show(before)
    assert torch.equal(weight(other), pretrained)


def test_who_decides_how_many_train_at_once(tiny_base: Path, data: Path) -> None:
    config, cpu = config_of(tiny_base, data), torch.device("cpu")

    def asking(workers: int, **sections: Any) -> RunConfig:
        engine = config.engine.model_copy(update={"workers": workers})
        return config.model_copy(update={"engine": engine, **sections})

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert number_of_workers(asking(0), cpu, 5) == 3
        assert number_of_workers(asking(0), cpu, 2) == 2
        assert number_of_workers(asking(0), torch.device("cuda"), 5) == 1
    finally:
        torch.set_num_threads(before)
    assert number_of_workers(asking(4), torch.device("cuda"), 5) == 4
    buffered = config.rounds.model_copy(update={"mode": "buffered"})
    assert number_of_workers(asking(0, rounds=buffered), cpu, 5) == 1
    with pytest.raises(ConfigError, match=r"engine.workers = 2 is not possible: the order of updates"):
        number_of_workers(asking(2, rounds=buffered), cpu, 5)
    few_bits = asking(2).engine.model_copy(update={"quantization": "4bit"})
    with pytest.raises(ConfigError, match=r"engine.workers = 2 is not possible: layers of few bits"):
        number_of_workers(asking(2, engine=few_bits), cpu, 5)


def tensors() -> list[torch.Tensor]:
    """All that are alive."""
    gc.collect()
    return [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]


@pytest.mark.parametrize("private", [True, False])
def test_nothing_of_a_client_stays_on_the_device_between_its_turns(
    tiny_base: Path, data: Path, tmp_path: Path, private: bool
) -> None:
    held: dict[int, int] = {}
    for clients in (2, 10):
        config = config_of(
            tiny_base,
            data,
            run={"name": "many", "rounds": 2},
            privacy={"enabled": private, "epsilon": 80.0, "delta": 1e-2},
            strategy={"name": "fedavg"},
            train={"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1, "optimizer": "adam"},
            rounds={"min_clients": clients},
            data={"source": str(data), "clients": clients},
            engine={"workers": 1},
        )
        others = tensors()
        federation = build(config, tmp_path / f"run-{clients}")
        starting = starting_adapter(federation.model.schema, 0)
        with Store(tmp_path / f"state-{clients}", durable=False) as store:
            coordinator = Coordinator(
                config,
                federation.model.schema,
                build_strategy(config),
                store,
                starting=starting,
                clock=standing_clock,
                expect=clients,
            )
            steps = run_inprocess(federation, coordinator)
            while coordinator.state.round == 0:
                next(steps)
            known = {id(each) for each in others}
            mine = [each.untyped_storage() for each in tensors() if id(each) not in known]
            held[clients] = sum({each.data_ptr(): each.nbytes() for each in mine}.values())
            for _ in steps:
                pass
    assert held[10] <= held[2] + 1024, "eight more clients, and no tensor more"
