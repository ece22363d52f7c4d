"""The battery catches what promises too much: each of these has one false trait or one broken promise."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest

from fedloom.core.errors import SchemaError
from fedloom.core.schema import Array, Role, Tensors
from fedloom.strategies.api import State, Strategy, Traits
from fedloom.strategies.conformance import StrategyConformance
from fedloom.strategies.drift.scaffold import SCAFFOLD
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.ffa import FFA
from fedloom.strategies.robust.coordinate import median
from fedloom.strategies.transforms.average import Average, select
from fedloom.strategies.transforms.norm_bound import NormBound
from fedloom.strategies.transforms.schedule import Schedule
from fedloom.strategies.transforms.transform import Transform


@dataclass(frozen=True)
class Claiming(Transform):
    """Says of another strategy what is not so."""

    inner: Strategy
    claims: Traits

    @property
    def traits(self) -> Traits:
        return self.claims


@dataclass(frozen=True)
class Otherwise(FedAvg):
    """Gives another model than the one that clients start from."""

    found: Callable[[State], Tensors] = lambda state: state.adapter

    def result(self, state: State) -> Tensors:
        return self.found(state)


@dataclass(frozen=True)
class Forgetful(FedAvg):
    """Gives a model that is not in the stored state."""

    extra: ClassVar[dict[int, Array]] = {}

    def commit(self, state: State, acc: Any) -> State:
        after = super().commit(state, acc)
        self.extra[id(after)] = np.zeros(1)
        return after

    def result(self, state: State) -> Tensors:
        moved = 1e-7 if id(state) in self.extra else 0.0
        return {name: (each + np.float32(moved)).astype(np.float32) for name, each in state.adapter.items()}


class Drifting(FFA):
    """Moves what nobody trained."""

    def commit(self, state: State, acc: Any) -> State:
        after = super().commit(state, acc)
        drifted = {"layer.0.query.lora_A": after.adapter["layer.0.query.lora_A"] * np.float32(1 + 1e-6)}
        return replace(after, adapter={**after.adapter, **drifted})


def _by_turns() -> Schedule:
    return Schedule(
        tuple(Average(select(role)) for role in (Role.LORA_B, Role.LORA_A)), turn=lambda commits: commits % 2
    )


@pytest.mark.parametrize(
    ("strategy", "law"),
    [
        (Claiming(NormBound(FedAvg(), 2.0), Traits(linear=True)), "a_linear_strategy_needs_only_the_mean"),
        (Claiming(_by_turns(), Traits(same_tensors=True)), "the_same_tensors_are_trained_in_every_round_if_declared"),
        (Claiming(FedSVD(), Traits()), "coordinates_stay_unless_declared"),
        (Claiming(Drifting(), Traits(moments=True)), "coordinates_stay_unless_declared"),
        (Claiming(median(), Traits()), "memory_does_not_grow_with_clients_unless_declared"),
        (Claiming(FedAvg(), Traits(keeps_updates=True)), "memory_does_not_grow_with_clients_unless_declared"),
        (Claiming(FedAvg(), Traits(remembers_clients=True)), "state_does_not_remember_clients_unless_declared"),
        (Claiming(SCAFFOLD(), Traits(plain_sgd=True)), "state_does_not_remember_clients_unless_declared"),
        (Claiming(SCAFFOLD(), Traits(remembers_clients=True)), "rates_do_not_count_unless_declared"),
        (Claiming(FedAvg(), Traits(plain_sgd=True)), "rates_do_not_count_unless_declared"),
        (Claiming(SCAFFOLD(), Traits(linear=True)), "a_linear_strategy_needs_only_the_mean"),
        (Claiming(FedAvg(), Traits(unweighted=True)), "weights_do_not_count_if_declared"),
        (Claiming(FFA(), Traits(least_updates=2)), "fewer_updates_than_declared_are_refused"),
        (Otherwise(found=lambda state: {}), "what_is_exported_is_what_was_evaluated"),
        (
            Otherwise(found=lambda state: {n: t * np.float32(1.01) for n, t in state.adapter.items()}),
            "what_is_exported_is_what_was_evaluated",
        ),
        (
            Otherwise(found=lambda state: {n: t.astype(np.float64) for n, t in state.adapter.items()}),
            "what_is_exported_is_what_was_evaluated",
        ),
        (Forgetful(), "what_is_exported_is_what_was_evaluated"),
    ],
)
def test_a_false_promise_is_found(strategy: Strategy, law: str) -> None:
    class Tried(StrategyConformance):
        def strategy(self) -> Strategy:
            return strategy

    try:
        with pytest.raises((AssertionError, SchemaError, pytest.fail.Exception)):
            getattr(Tried(), f"test_{law}")()
    except pytest.skip.Exception:
        pytest.fail(f"the law {law} was not tried")
