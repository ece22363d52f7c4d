"""Trajectories of every shipped strategy on inputs that are the same bits everywhere; `python FILE` records them anew.

Recorded before strategies became compositions of transforms. On the machine that recorded them a rewrite leaves both
files as they are, `git diff` says so. Elsewhere sums are still equal bit for bit, while BLAS and LAPACK may round the
factors of an SVD differently: those cases are compared by their values.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fedloom.core.schema import Array, Role, Schema, Tensors, TensorSpec
from fedloom.strategies.alternating.rolora import RoLoRA
from fedloom.strategies.api import State, Strategy, Update
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedpeft import FedPEFT
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.ffa import FFA
from fedloom.strategies.robust.bulyan import BULYAN
from fedloom.strategies.robust.coordinate import MEDIAN, TRIMMED_MEAN
from fedloom.strategies.robust.krum import KRUM, MULTI_KRUM
from fedloom.strategies.robust.rule import Robust
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.transforms.average import uploaded
from fedloom.strategies.transforms.buffered import Buffered
from fedloom.strategies.transforms.norm_bound import NormBound
from fedloom.strategies.transforms.user_level_dp import UserLevel

HERE = Path(__file__).parent
DIGESTS, FACTORS = HERE / "digests.json", HERE / "factors.safetensors"
ROUNDS = 5
WEIGHTS = (3.0, 250.5, 1.0, 17.0, 0.25, 40.0, 8.0)
SECRET = bytes(range(32))


@dataclass(frozen=True)
class Case:
    """One strategy on one adapter, with so many clients."""

    name: str
    make: Callable[[], Strategy]
    schema: Schema
    clients: int = 4
    weighted: bool = True
    fresh: bool = False
    """Whether the run begins from a drawn adapter, whose B is zero, rather than from one that was trained."""
    stale: bool = False
    """Whether client k's update was made k rounds ago."""

    @property
    def factored(self) -> bool:
        """Whether the adapter goes through an SVD."""
        return "fedsvd" in self.name or "orthonormal" in self.name


def _pair(module: str, out: int, rank: int, inner: int) -> tuple[TensorSpec, TensorSpec]:
    return (
        TensorSpec(f"{module}.lora_A", module, Role.LORA_A, (rank, inner)),
        TensorSpec(f"{module}.lora_B", module, Role.LORA_B, (out, rank)),
    )


_PAIRS = (*_pair("layer.0.query", 6, 3, 5), *_pair("layer.1.value", 4, 3, 7))
_UNEQUAL = (*_pair("layer.0.query", 6, 2, 5), *_pair("layer.1.value", 3, 4, 3), *_pair("layer.1.dense", 9, 1, 8))
_HEAD = (
    TensorSpec("classifier.weight", "classifier", Role.HEAD, (3, 4)),
    TensorSpec("classifier.bias", "classifier", Role.HEAD, (3,)),
)
_BIAS = (TensorSpec("dense.bias", "dense", Role.BIAS, (5,)), TensorSpec("query.bias", "query", Role.BIAS, (2,)))

PAIRS, UNEQUAL = Schema((*_PAIRS, *_HEAD), 2.0), Schema((*_UNEQUAL, *_HEAD), 0.5)
BARE, MIXED = Schema(_PAIRS, 1.0), Schema((*_BIAS, *_PAIRS, *_HEAD), 2.0)
BIASES, HEADS = Schema((*_BIAS, *_HEAD)), Schema(_HEAD)


def cases() -> list[Case]:
    """Every case, by a name that no other has."""
    found = [
        Case("fedavg/pairs", FedAvg, PAIRS),
        Case("fedavg/mixed", FedAvg, MIXED, 5),
        Case("fedavg/frozen head", lambda: FedAvg(train_head=False), PAIRS, 3),
        Case("fedavg/heads", FedAvg, HEADS),
        Case("fedavg/stale", lambda: Buffered(FedAvg()), PAIRS, stale=True),
        Case("ffa/pairs", FFA, PAIRS),
        Case("ffa/unequal", lambda: FFA(train_head=False), UNEQUAL, 5),
        Case("ffa/stale", lambda: Buffered(FFA()), PAIRS, stale=True),
        Case("ffa orthonormal/pairs", lambda: FFA(orthonormal=True), PAIRS),
        Case("ffa orthonormal/fresh", lambda: FFA(orthonormal=True), UNEQUAL, fresh=True),
        Case("fedsvd/pairs", FedSVD, PAIRS),
        Case("fedsvd/fresh", FedSVD, PAIRS, fresh=True),
        Case("fedsvd/unequal", FedSVD, UNEQUAL, 5),
        Case("fedsvd/bare", FedSVD, BARE, 3),
        Case("fedsvd every second/pairs", lambda: FedSVD(period=2, train_head=False), PAIRS),
        Case("fedpeft/pairs", FedPEFT, PAIRS),
        Case("fedpeft/bias", lambda: FedPEFT(kind="bias"), BIASES),
        Case("fedpeft/bias of mixed", lambda: FedPEFT(kind="bias", train_head=False), MIXED),
        Case("fedpeft/head", lambda: FedPEFT(kind="head"), MIXED, 5),
        Case("rolora/pairs", RoLoRA, PAIRS),
        Case("rolora/unequal", lambda: RoLoRA(train_head=False), UNEQUAL, 3),
    ]
    for name, rule in (
        ("median", MEDIAN),
        ("trimmed mean", TRIMMED_MEAN),
        ("krum", KRUM),
        ("multi-krum", MULTI_KRUM),
        ("bulyan", BULYAN),
    ):
        found += [
            Case(f"{name}/ffa", partial(Robust, FFA(), rule), PAIRS, 7),
            Case(f"{name}/fedsvd", partial(Robust, FedSVD(), rule), UNEQUAL, 7),
            Case(f"{name} bounded/ffa", partial(NormBound, Robust(FFA(), rule), 1.5), PAIRS, 7),
        ]
    found += [
        Case("krum/fedavg", lambda: Robust(FedAvg(), KRUM), PAIRS, 5),
        Case("bounded/fedavg", lambda: NormBound(FedAvg(), 1.5), PAIRS),
        Case("bounded/fedsvd", lambda: NormBound(FedSVD(period=2), 1.5), UNEQUAL),
        Case("user level/fedavg", lambda: UserLevel(FedAvg(), SECRET, 4, 0.75, 0.5), MIXED, weighted=False),
        Case("user level/fedsvd", lambda: UserLevel(FedSVD(), SECRET, 5, 0.75, 0.5), PAIRS, 5, weighted=False),
        Case("user level tree/ffa", lambda: UserLevel(FFA(), SECRET, 3, 0.75, 0.5, "tree"), PAIRS, 3, weighted=False),
        Case(
            "user level quantile/ffa",
            lambda: UserLevel(FFA(), SECRET, 4, 0.75, 0.5, target_quantile=0.5),
            PAIRS,
            weighted=False,
        ),
    ]
    return found


def trajectory(case: Case) -> Iterator[State]:
    """The state before the first round and after each."""
    strategy = case.make()
    state = strategy.init(case.schema, _start(case), 11)
    yield state
    for round in range(ROUNDS):
        acc = None
        for index in range(case.clients):
            plan = strategy.plan(state, state.round, f"client-{index}")
            draw = np.random.Generator(np.random.Philox(key=[17, 10 * round + index]))
            delta = {s.name: _drawn(draw, s.shape) for s in uploaded(case.schema, plan).tensors}
            weight = WEIGHTS[index] if case.weighted else 1.0
            update = Update(f"client-{index}", weight, plan.broadcast, delta, staleness=index if case.stale else 0)
            acc = strategy.fold(state, acc, update)
        state = strategy.commit(state, acc)
        yield state


def digest(state: State) -> str:
    """SHA-256 over names, types, shapes and bytes of everything a state holds."""
    found = hashlib.sha256(f"{state.round}".encode())
    for prefix, group in (("adapter/", state.adapter), ("memory/", state.memory)):
        for name, tensor in sorted(group.items()):
            array = np.asarray(tensor, order="C")
            found.update(f"|{prefix}{name} {array.dtype.str} {array.shape} ".encode() + array.tobytes())
    return found.hexdigest()


def _drawn(draw: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Whole numbers over a power of two: no library's logarithm is in them."""
    return (draw.integers(-2000, 2001, shape) / 4096).astype(np.float32)


def _start(case: Case) -> Tensors:
    if case.fresh:
        return starting_adapter(case.schema, 11)
    draw = np.random.Generator(np.random.Philox(key=[19, 0]))
    return {spec.name: _drawn(draw, spec.shape) for spec in case.schema.tensors}


if __name__ == "__main__":
    digests: dict[str, list[str]] = {}
    factors: dict[str, Array] = {}
    for each in cases():
        states = list(trajectory(each))
        digests[each.name] = [digest(state) for state in states]
        if each.factored:
            factors |= {f"{each.name}/{name}": tensor for name, tensor in states[-1].adapter.items()}
    assert len(digests) == len(cases()), "two cases share a name"
    DIGESTS.write_text(json.dumps(digests, indent=1) + "\n")
    save_file(factors, FACTORS)
