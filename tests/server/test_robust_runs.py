"""Robust rules on the real coordinator: what a run file may ask of them, and rounds with a liar in them."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError, UpdateRejected
from fedloom.server.build import build_strategy
from fedloom.server.rounds.state import RunCreated
from fedloom.server.storage.local import Store
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.transforms.coded_broadcast import CodedBroadcast
from fedloom.strategies.transforms.norm_bound import NormBound

NAMES = ("ada", "bo", "cy", "dee", "eve", "flo", "gus")
RULES = {"median": 3, "trimmed-mean": 3, "krum": 5, "multi-krum": 5, "bulyan": 7}


@pytest.mark.parametrize(("name", "least"), RULES.items())
def test_a_round_that_could_close_with_too_few_is_refused(
    store: Store, federate: Any, configure: Callable[..., RunConfig], name: str, least: int
) -> None:
    config = configure(strategy={"name": name}, rounds={"min_clients": least - 1})

    with pytest.raises(ConfigError, match=rf"min_clients = {least - 1} with strategy '{name}'.*needs {least} updates"):
        federate(store, config, build_strategy(config))

    enough = configure(strategy={"name": name}, rounds={"min_clients": least})
    federate(store, enough, build_strategy(enough))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"strategy": {"name": "median", "weighting": "examples"}}, "counts every client once whatever it declares"),
        (
            {"strategy": {"name": "krum"}, "secure_aggregation": {"enabled": True}},
            "'krum' needs every update by itself",
        ),
        ({"strategy": {"norm_bound": 1.0}, "secure_aggregation": {"enabled": True}}, "with strategy.norm_bound needs"),
        (
            {"strategy": {"name": "bulyan"}, "user_level": {"enabled": True, "cohort": 7}},
            "declare the trait linear",
        ),
        (
            {"strategy": {"norm_bound": 1.0}, "user_level": {"enabled": True, "cohort": 7}},
            "declare the trait linear",
        ),
    ],
)
def test_what_a_rule_cannot_go_with_is_refused(
    store: Store, federate: Any, configure: Callable[..., RunConfig], sections: dict[str, Any], words: str
) -> None:
    config = configure(rounds={"min_clients": 7}, **sections)

    with pytest.raises(ConfigError, match=words):
        federate(store, config, build_strategy(config))


@pytest.mark.parametrize("name", RULES)
def test_a_liar_moves_nothing_and_a_restart_changes_nothing(
    tmp_path: Path, federate: Any, configure: Callable[..., RunConfig], name: str
) -> None:
    """Two coordinators, one killed in the middle of a round and fed in another order, commit the same bytes."""
    rounds = {"min_clients": 7, "max_update_norm": 1e30}
    config = configure(length=1, strategy={"name": name}, rounds=rounds)
    ends = []
    for restart, order in ((False, NAMES), (True, NAMES[::-1])):
        folder = tmp_path / f"state-{restart}"
        with Store(folder, durable=False) as store:
            federation = federate(store, config, build_strategy(config))
            federation.begin(*NAMES)
            messages = {each: federation.update(each, 1e20 if each == "cy" else None) for each in NAMES}
            for each in order[:4]:
                federation.send(*messages[each])
            if not restart:
                for each in order[4:]:
                    federation.send(*messages[each])
                ends.append(federation.adapter())
        if restart:
            with Store(folder, durable=False) as store:
                federation = federate(store, config, build_strategy(config))
                federation.begin(*NAMES)
                for each in order[4:]:
                    federation.send(*messages[each])
                assert federation.coordinator.finished
                ends.append(federation.adapter())

    assert ends[0] == ends[1]
    assert max(np.abs(values).max() for values in ends[0].values()) < 10


def test_a_run_files_bound_reaches_every_update(
    store: Store, federate: Any, configure: Callable[..., RunConfig]
) -> None:
    config = configure(length=1, strategy={"norm_bound": 0.5}, rounds={"max_update_norm": 1e30})
    strategy = build_strategy(config)
    assert strategy == NormBound(CodedBroadcast(FedAvg(), "auto"), 0.5)
    federation = federate(store, config, strategy)
    federation.begin("ada", "bo")
    before = {name: tensor.copy() for name, tensor in federation.coordinator.state.adapter.items()}

    for name in ("ada", "bo"):
        federation.send(*federation.update(name, 1e20))

    after = federation.coordinator.state.adapter
    moved = np.sqrt(sum(np.sum((after[n].astype(np.float64) - t) ** 2) for n, t in before.items()))
    assert moved == pytest.approx(0.5, rel=1e-5)


def test_runs_from_before_the_bound_go_on(store: Store, federate: Any, configure: Callable[..., RunConfig]) -> None:
    """What was agreed is told as it was when [strategy] had three keys and no codec was chosen by size."""
    config = configure()
    federate(store, config, FedAvg())

    created = store.events()[0]

    strategy = '{"name":"fedavg","weighting":"uniform","options":{}}'
    spec = config.spec.model_dump_json().replace(
        '{"upload":"auto","broadcast":"auto"}', '{"upload":"fp32","broadcast":"fp32"}'
    )
    text = spec + strategy + config.user_level.model_dump_json()
    assert isinstance(created, RunCreated)
    assert created.spec == hashlib.sha256(text.encode()).hexdigest()


def test_nan_is_refused_before_any_rule_sees_it(
    store: Store, federate: Any, configure: Callable[..., RunConfig]
) -> None:
    config = configure(strategy={"name": "median"}, rounds={"min_clients": 3})
    federation = federate(store, config, build_strategy(config))
    federation.begin(*NAMES[:4])

    with pytest.raises(UpdateRejected, match="NaN or Inf"):
        federation.send(*federation.update("bo", float("nan")))
    for name in ("ada", "cy", "dee"):
        federation.send(*federation.update(name))

    assert federation.coordinator.state.round == 1
