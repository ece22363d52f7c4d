"""Rewriting pairs around any strategy, against dense SVDs."""

from dataclasses import dataclass

import numpy as np
import pytest

from fedloom.core.errors import ConfigError
from fedloom.core.schema import LORA, Role
from fedloom.strategies.api import Plan, State, Strategy, Update
from fedloom.strategies.conformance import StrategyConformance, run_round
from fedloom.strategies.fedask import FedASK
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedopt import FedOpt
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.robust.krum import krum
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.transforms.average import Average, select
from fedloom.strategies.transforms.norm_bound import NormBound
from fedloom.strategies.transforms.refactorize import OrthonormalStart, Refactorize
from fedloom.strategies.transforms.schedule import Schedule


class TestAround(StrategyConformance):
    @pytest.fixture(
        autouse=True,
        params=[
            lambda: Refactorize(FedAvg(), 2),
            lambda: Refactorize(krum(inner="fedavg")),
            lambda: NormBound(Refactorize(OrthonormalStart(FedAvg(train_head=False))), 1e3),
            lambda: FedSVD(server_momentum=0.9),
            lambda: FedSVD(singular_values="both"),
        ],
    )
    def _make(self, request: pytest.FixtureRequest) -> None:
        self.make = request.param

    def strategy(self) -> Strategy:
        made: Strategy = self.make()
        return made


@pytest.mark.parametrize("period", [1, 3])
def test_factors_are_those_of_a_dense_svd_in_the_rounds_of_the_period(period: int) -> None:
    battery = TestAround()
    schema, strategy = battery.schema(), FedSVD(period=period)
    draw = np.random.Generator(np.random.Philox(key=[1, 1]))
    start = {s.name: draw.normal(0, 0.3, s.shape).astype(np.float32) for s in schema.tensors}
    state = strategy.init(schema, start, 0)
    plain = Average(select(Role.LORA_B))
    for _ in range(4):
        updates = battery.updates(strategy, state)
        averaged = run_round(plain, state, updates).adapter
        state = run_round(strategy, state, updates)
        for pair in schema.pairs:
            b, a = (state.adapter[name].astype(np.float64) for name in (pair.b, pair.a))
            product = averaged[pair.b].astype(np.float64) @ averaged[pair.a]
            np.testing.assert_allclose(b @ a, product, atol=1e-6)
            if state.round % period:
                np.testing.assert_array_equal(state.adapter[pair.a], averaged[pair.a])
                continue
            u, sigma, vt = np.linalg.svd(product, full_matrices=False)
            rank = a.shape[0]
            sign = np.sign(np.sum(a * vt[:rank], axis=1))
            np.testing.assert_allclose(a, vt[:rank] * sign[:, None], atol=1e-5)
            np.testing.assert_allclose(b, u[:, :rank] * sigma[:rank] * sign, atol=1e-5)


def test_the_span_of_a_is_that_of_the_first_a_for_good() -> None:
    battery, strategy = TestAround(), FedSVD()
    schema = battery.schema()
    first = starting_adapter(schema, 3)
    state = strategy.init(schema, first, 3)
    for _ in range(12):
        before, state = state, run_round(strategy, state, battery.updates(strategy, state))

        for pair in schema.pairs:
            start, a = first[pair.a].astype(np.float64), state.adapter[pair.a].astype(np.float64)
            np.testing.assert_allclose(a.T @ a, np.linalg.pinv(start) @ start, atol=1e-5)
            assert np.abs(a - before.adapter[pair.a]).max() > 1e-3, "it turns within its span"


@dataclass(frozen=True)
class Keeping(FedAvg):
    """Lets clients keep B."""

    def plan(self, state: State, round: int, client: str) -> Plan:
        return Plan(train=LORA, broadcast=state.adapter, personal=frozenset({"layer.0.query.lora_B"}))


def test_what_would_stay_in_the_old_coordinates_is_refused() -> None:
    schema = TestAround().schema()
    strategy = Refactorize(Keeping())
    state = strategy.init(schema, schema.zeros(), 0)

    with pytest.raises(ConfigError, match=r"Keeping lets clients keep layer\.0\.query\.lora_B, and a refactorization"):
        strategy.plan(state, 0, "ada")
    with pytest.raises(ConfigError, match="refactorization period is 0; set a number of rounds from 1 up"):
        FedSVD(period=0)


@pytest.mark.parametrize("strategy", [FedSVD(singular_values="both"), FedASK()], ids=["fedsvd", "fedask"])
def test_roots_of_the_singular_values_go_to_both_factors(strategy: Strategy) -> None:
    battery = TestAround()
    schema = battery.schema()
    state = strategy.init(schema, starting_adapter(schema, 3), 3)
    for _ in range(3):
        updates = battery.updates(strategy, state)
        averaged = run_round(Average(select(Role.LORA_B)), state, updates).adapter

        state = run_round(strategy, state, updates)

        for pair in schema.pairs:
            b, a = (state.adapter[name].astype(np.float64) for name in (pair.b, pair.a))
            product = averaged[pair.b].astype(np.float64) @ averaged[pair.a]
            sigma = np.linalg.svd(product, compute_uv=False)[:3]
            np.testing.assert_allclose(b @ a, product, atol=1e-6)
            np.testing.assert_allclose(b.T @ b, np.diag(sigma), atol=1e-5)
            np.testing.assert_allclose(a @ a.T, np.diag(sigma), atol=1e-5)


@pytest.mark.parametrize(("width", "exact"), [(2, False), (3, True), (5, True)])
def test_fedask_is_the_papers_sketch_where_that_is_as_wide_as_the_rank(width: int, exact: bool) -> None:
    """Its two questions: Y = sum_k p_k B_k (A W), Q = qr(Y), and P = sum_k p_k A^T (B_k^T Q), whose SVD is taken."""
    battery, strategy = TestAround(), FedASK()
    schema, draw = battery.schema(), np.random.default_rng(2)
    state = strategy.init(schema, starting_adapter(schema, 3), 3)
    updates = battery.updates(strategy, state)
    shares = [update.weight / sum(each.weight for each in updates) for update in updates]

    after = run_round(strategy, state, updates)

    for pair in schema.pairs:
        a = state.adapter[pair.a].astype(np.float64)
        clients = [(share, update.value(pair.b)) for share, update in zip(shares, updates, strict=True)]
        probe = draw.normal(size=(a.shape[1], width))
        basis, _ = np.linalg.qr(np.sum([share * b @ (a @ probe) for share, b in clients], axis=0))
        answers = np.sum([share * a.T @ (b.T @ basis) for share, b in clients], axis=0)
        u, sigma, vt = np.linalg.svd(answers.T, full_matrices=False)
        theirs = (basis @ u * np.sqrt(sigma), np.sqrt(sigma)[:, None] * vt)
        ours = (after.adapter[pair.b].astype(np.float64), after.adapter[pair.a].astype(np.float64))
        missed = np.abs(ours[0] @ ours[1] - theirs[0] @ theirs[1]).max()
        if not exact:
            assert missed > 0.01
            continue
        assert missed < 1e-6
        sign = np.sign(np.sum(ours[1] * theirs[1][:3], axis=1))
        np.testing.assert_allclose(ours[0], theirs[0][:, :3] * sign, atol=1e-5)
        np.testing.assert_allclose(ours[1], theirs[1][:3] * sign[:, None], atol=1e-5)


def test_a_direction_without_a_singular_value_can_still_be_trained() -> None:
    battery, strategy = TestAround(), FedSVD(singular_values="both")
    schema = battery.schema()
    state = strategy.init(schema, starting_adapter(schema, 3), 3)
    updates = battery.updates(strategy, state)
    for update in updates:
        for pair in schema.pairs:
            update.delta[pair.b][:, 1:] = 0

    state = run_round(strategy, state, updates)

    for pair in schema.pairs:
        np.testing.assert_allclose(np.linalg.norm(state.adapter[pair.a][1:], axis=1), 1.0, atol=1e-6)
        assert not state.adapter[pair.b][:, 1:].any()


@pytest.mark.parametrize("period", [1, 2])
def test_momentum_turns_along_with_the_basis(period: int) -> None:
    """FedSVD with momentum on the coordinator is FFA with the same, seen in another basis; left behind, it is not."""
    schema = TestAround().schema().select(LORA)
    svd = FedSVD(server_momentum=0.9, period=period)
    ffa = FedOpt("momentum", 1.0, beta1=0.9)
    start = OrthonormalStart(ffa).init(schema, starting_adapter(schema, 3), 3)
    states = {svd: start, ffa: start}
    draw = np.random.default_rng(5)
    for _ in range(5):
        moves = {pair: draw.normal(0, 0.1, start.adapter[pair.b].shape) for pair in schema.pairs}
        for strategy, state in states.items():
            # The same change of the product, written in this strategy's basis: D A_0 = (D A_0 A^T) A.
            turns = {p: start.adapter[p.a].astype(np.float64) @ state.adapter[p.a].T for p in schema.pairs}
            delta = {p.b: (move @ turns[p]).astype(np.float32) for p, move in moves.items()}
            states[strategy] = run_round(strategy, state, [Update("ada", 1.0, state.adapter, delta)])

        for pair in schema.pairs:
            ours, theirs = (state.adapter[pair.b] @ state.adapter[pair.a] for state in states.values())
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
    turned = np.abs(states[svd].adapter[pair.a] - states[ffa].adapter[pair.a]).max()
    assert turned > 0.1, "the bases are far apart"


def test_second_moments_and_roots_are_not_turned() -> None:
    with pytest.raises(ConfigError, match="FedOpt keeps second moments in the coordinates of A and B"):
        Refactorize(FedOpt("adam"))
    with pytest.raises(ConfigError, match=r"momentum, which turns along only where the rows of A are orthonormal"):
        FedSVD(server_momentum=0.5, singular_values="both")


def test_alternating_factors_may_be_rewritten_between_their_turns() -> None:
    """RoLoRA with an orthonormal A whenever B is trained: the model is that of plain RoLoRA after the same round."""
    b, a = (Average(select(role)) for role in (Role.LORA_B, Role.LORA_A))
    plain = Schedule((b, a), turn=lambda commits: commits % 2)
    strategy = Refactorize(plain)
    battery = TestAround()
    schema = battery.schema()
    draw = np.random.Generator(np.random.Philox(key=[2, 1]))
    start = {s.name: draw.normal(0, 0.3, s.shape).astype(np.float32) for s in schema.tensors}
    state = strategy.init(schema, start, 0)
    for _ in range(4):
        updates = battery.updates(strategy, state)
        expected = run_round(plain, state, updates).adapter
        state = run_round(strategy, state, updates)
        for pair in schema.pairs:
            a_now = state.adapter[pair.a].astype(np.float64)
            np.testing.assert_allclose(state.adapter[pair.b] @ a_now, expected[pair.b] @ expected[pair.a], atol=1e-5)
            np.testing.assert_allclose(a_now @ a_now.T, np.eye(len(a_now)), atol=1e-6)
