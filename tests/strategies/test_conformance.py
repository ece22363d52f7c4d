"""Every registered strategy, ours and any that is installed, passes the battery with its default options."""

import pytest

from fedloom.core.registry import build, entries
from fedloom.core.schema import Role, Schema, Start, TensorSpec
from fedloom.strategies.api import Strategy
from fedloom.strategies.conformance import StrategyConformance
from fedloom.strategies.fedpeft import FedPEFT
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.ffa import FFA

TWO_PAIRS = Schema(
    (
        TensorSpec("q.shared_A", "q", "shared", (3, 5), Start.KAIMING, 0),
        TensorSpec("q.shared_B", "q", "shared", (6, 3), Start.ZERO, 1),
        TensorSpec("q.own_A", "q", "own", (3, 5), Start.KAIMING, 0),
        TensorSpec("q.own_B", "q", "own", (6, 3), Start.ZERO, 1),
        TensorSpec("classifier.weight", "classifier", Role.HEAD, (3, 4)),
    ),
    scale=2.0,
)


class TestRegistered(StrategyConformance):
    @pytest.fixture(autouse=True, params=list(entries("strategies")))
    def _name(self, request: pytest.FixtureRequest) -> None:
        self.name: str = request.param

    def strategy(self) -> Strategy:
        made: Strategy = build("strategies", self.name, {"train_head": True})
        return made

    def schema(self) -> Schema:
        return TWO_PAIRS if self.name == "feddpa" else super().schema()


class TestFrozenHead(TestRegistered):
    @pytest.fixture(autouse=True, params=[name for name in entries("strategies") if name != "fedper"])
    def _name(self, request: pytest.FixtureRequest) -> None:
        """All but the one whose clients keep the head, which says so: see test_personal."""
        self.name = request.param

    def strategy(self) -> Strategy:
        made: Strategy = build("strategies", self.name, {"train_head": False})
        return made


class TestOrthonormalFFA(StrategyConformance):
    def strategy(self) -> Strategy:
        return FFA(orthonormal=True)


class TestFedSVDEverySecondRound(StrategyConformance):
    def strategy(self) -> Strategy:
        return FedSVD(period=2)


class TestBias(StrategyConformance):
    def strategy(self) -> Strategy:
        return FedPEFT(kind="bias")

    def schema(self) -> Schema:
        return Schema(
            (
                TensorSpec("dense.bias", "dense", Role.BIAS, (5,)),
                TensorSpec("classifier.weight", "classifier", Role.HEAD, (3, 4)),
            )
        )


class TestHead(StrategyConformance):
    def strategy(self) -> Strategy:
        return FedPEFT(kind="head")

    def schema(self) -> Schema:
        return Schema((TensorSpec("classifier.weight", "classifier", Role.HEAD, (3, 4)),))
