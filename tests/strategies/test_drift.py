"""SCAFFOLD and FedDyn: closed forms, the papers' algorithms in dense numpy, and what they are not combined with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest

from fedloom.core.errors import ConfigError, ProtocolError
from fedloom.core.registry import build
from fedloom.core.schema import Array, Role, Schema, TensorSpec
from fedloom.strategies.api import State, Strategy, Update
from fedloom.strategies.conformance import StrategyConformance, run_round
from fedloom.strategies.drift.client_gradients import LARGEST
from fedloom.strategies.drift.feddyn import FedDyn
from fedloom.strategies.drift.scaffold import SCAFFOLD, ControlVariates
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.ffa import FFA
from fedloom.strategies.robust.krum import krum
from fedloom.strategies.state import state_from_bytes, state_to_bytes
from fedloom.strategies.transforms.average import Average, select
from fedloom.strategies.transforms.buffered import Buffered
from fedloom.strategies.transforms.norm_bound import NormBound
from fedloom.strategies.transforms.refactorize import Refactorize
from fedloom.strategies.transforms.schedule import Schedule
from fedloom.strategies.transforms.server_optimizer import ServerOptimizer
from fedloom.strategies.transforms.user_level_dp import UserLevel

Float64 = npt.NDArray[np.float64]
Gradient = Callable[[Mapping[str, Float64]], Mapping[str, Float64]]
BOTH = (SCAFFOLD(), FedDyn())


class TestScaffoldOnBothFactors(StrategyConformance):
    def strategy(self) -> Strategy:
        return SCAFFOLD(inner="fedavg")


class TestFedDynOnBothFactors(StrategyConformance):
    def strategy(self) -> Strategy:
        return FedDyn(inner="fedavg")


class TestScaffoldWithAServerOptimizer(StrategyConformance):
    def strategy(self) -> Strategy:
        return SCAFFOLD(inner="fedopt")


@dataclass(frozen=True)
class Client:
    """Plain SGD on gradients that are known."""

    gradient: Gradient
    rates: Mapping[str, float]
    steps: int
    weight: float = 1.0

    def update(self, strategy: Strategy, state: State, name: str) -> Update:
        plan = strategy.plan(state, state.round, name)
        names = state.schema.select(plan.train).names()
        start = {each: np.asarray(tensor, np.float64) for each, tensor in plan.broadcast.items()}
        values, pull = dict(start), plan.local.get("proximal_mu", 0.0)
        for _ in range(self.steps):
            found = self.gradient(values)
            values |= {
                each: values[each]
                - self.rates[each] * (found[each] + plan.linear.get(each, 0.0) + pull * (values[each] - start[each]))
                for each in names
            }
        delta = {each: (values[each] - start[each]).astype(np.float32) for each in names}
        sums = {each: self.steps * self.rates[each] for each in names}
        return Update(name, self.weight, plan.broadcast, delta, linear=plan.linear, rate_sums=sums)


def rounds(strategy: Strategy, state: State, clients: Mapping[str, Client], cohorts: Sequence[Sequence[str]]) -> State:
    for cohort in cohorts:
        state = run_round(strategy, state, [clients[name].update(strategy, state, name) for name in sorted(cohort)])
    return state


X = Schema((TensorSpec("x", "m", Role.BIAS, (1,)),))


def quadratics(steps: int = 10, weights: Sequence[float] = (1.0, 1.0)) -> dict[str, Client]:
    """1/2 a (x - b)^2 for a = 1, 4 and b = 0, 3: with equal weights the sum is least at 2.4."""
    return {
        name: Client(lambda values, a=a, b=b: {"x": a * (values["x"] - b)}, {"x": 0.05}, steps, weight)  # type: ignore[misc]
        for name, a, b, weight in zip("ab", (1.0, 4.0), (0.0, 3.0), weights, strict=True)
    }


@pytest.mark.parametrize(
    ("strategy", "end"),
    [(FedAvg(), 2.069635), (SCAFFOLD(inner="fedavg"), 2.4), (FedDyn(0.5, "fedavg"), 2.4)],
    ids=lambda each: type(each).__name__,
)
def test_unlike_clients_come_to_the_common_optimum(strategy: Strategy, end: float) -> None:
    state = strategy.init(X, X.zeros(), 0)

    state = rounds(strategy, state, quadratics(), ["ab"] * 300)

    assert float(state.adapter["x"][0]) == pytest.approx(end, abs=1e-6)


@pytest.mark.parametrize("strategy", [SCAFFOLD(inner="fedavg"), FedDyn(0.5, "fedavg")], ids=["scaffold", "feddyn"])
def test_the_optimum_is_that_of_the_weighted_sum(strategy: Strategy) -> None:
    state = strategy.init(X, X.zeros(), 0)

    state = rounds(strategy, state, quadratics(weights=(30.0, 10.0)), ["ab"] * 200)

    assert float(state.adapter["x"][0]) == pytest.approx((10 * 4 * 3) / (30 + 10 * 4), abs=1e-6)


def test_of_unequal_steps_the_mean_favours_who_takes_more() -> None:
    """Why clients of a run take equally many: near 2.92683, the optimum if each counted by its steps, and not 2.4."""
    alike, steps, rate = quadratics(), {"a": 2, "b": 20}, 5e-4
    clients = {name: replace(each, rates={"x": rate}, steps=steps[name]) for name, each in alike.items()}
    shrunk = {"a": (1 - rate) ** 2, "b": (1 - 4 * rate) ** 20}
    exact = 3 * (1 - shrunk["b"]) / (2 - shrunk["a"] - shrunk["b"])

    state = rounds(FedAvg(), FedAvg().init(X, X.zeros(), 0), clients, ["ab"] * 1000)

    assert float(state.adapter["x"][0]) == pytest.approx(exact, abs=1e-5)
    assert exact == pytest.approx(2.92548, abs=1e-5)
    assert exact == pytest.approx((2 * 0 + 20 * 4 * 3) / (2 + 20 * 4), abs=2e-3)


# A pair over which A rests, and a head with a rate of its own; what each client minimises is quadratic in both.
PAIR = Schema(
    (
        TensorSpec("m.A", "m", Role.LORA_A, (2, 5)),
        TensorSpec("m.B", "m", Role.LORA_B, (4, 2)),
        TensorSpec("head", "head", Role.HEAD, (3,)),
    )
)
RATES, STEPS, NAMES = {"m.B": 0.04, "head": 0.1}, 6, ("ada", "bo", "cy", "di", "ed")
COHORTS = (NAMES, ("ada", "di"), ("bo", "cy", "ed"), ("ada",), ("cy", "di"), ("bo", "ed"), ("ada", "cy"), NAMES)


def unlike() -> tuple[dict[str, Array], dict[str, Gradient]]:
    draw = np.random.default_rng(4)
    start = {spec.name: draw.normal(0, 0.5, spec.shape).astype(np.float32) for spec in PAIR.tensors}
    a = start["m.A"].astype(np.float64)

    def of(target: Float64, curve: Float64, head: Float64) -> Gradient:
        return lambda values: {
            "m.B": (values["m.B"] @ a - target) @ a.T,
            "head": curve * (values["head"] - head),
        }

    return start, {name: of(draw.normal(0, 2, (4, 5)), draw.uniform(0.2, 3, 3), draw.normal(0, 2, 3)) for name in NAMES}


def scaffold_of_the_paper(start: Mapping[str, Array], gradients: Mapping[str, Gradient]) -> dict[str, Float64]:
    """Algorithm 1 with option II and eta_g = 1, one tensor after the other; N is the number of all clients."""
    x = {name: start[name].astype(np.float64) for name in RATES}
    c = {name: np.zeros_like(each) for name, each in x.items()}
    c_i = {client: dict(c) for client in NAMES}
    for cohort in COHORTS:
        y, c_plus = {client: dict(x) for client in cohort}, {}
        for client in cohort:
            for _ in range(STEPS):
                g = gradients[client](y[client])
                y[client] = {n: y[client][n] - RATES[n] * (g[n] - c_i[client][n] + c[n]) for n in RATES}
            c_plus[client] = {n: c_i[client][n] - c[n] + (x[n] - y[client][n]) / (STEPS * RATES[n]) for n in RATES}
        dx = {n: sum(y[k][n] - x[n] for k in cohort) / len(cohort) for n in RATES}
        dc = {n: sum(c_plus[k][n] - c_i[k][n] for k in cohort) / len(cohort) for n in RATES}
        x = {n: x[n] + dx[n] for n in RATES}
        c = {n: c[n] + len(cohort) / len(NAMES) * dc[n] for n in RATES}
        c_i |= c_plus
    return x


def feddyn_of_the_paper(start: Mapping[str, Array], gradients: Mapping[str, Gradient]) -> dict[str, Float64]:
    """Algorithm 1 with alpha = 0.3, whose inner problem is given STEPS steps of gradient descent."""
    alpha = 0.3
    theta = {name: start[name].astype(np.float64) for name in RATES}
    h = {name: np.zeros_like(each) for name, each in theta.items()}
    local = {client: dict(h) for client in NAMES}
    for cohort in COHORTS:
        ends = {}
        for client in cohort:
            w = dict(theta)
            for _ in range(STEPS):
                g = gradients[client](w)
                w = {n: w[n] - RATES[n] * (g[n] - local[client][n] + alpha * (w[n] - theta[n])) for n in RATES}
            ends[client] = w
        for client in cohort:
            local[client] = {n: local[client][n] - alpha * (ends[client][n] - theta[n]) for n in RATES}
        h = {n: h[n] - alpha / len(NAMES) * sum(ends[k][n] - theta[n] for k in cohort) for n in RATES}
        theta = {n: sum(ends[k][n] for k in cohort) / len(cohort) - h[n] / alpha for n in RATES}
    return theta


@pytest.mark.parametrize(
    ("strategy", "paper"),
    [(SCAFFOLD(), scaffold_of_the_paper), (FedDyn(alpha=0.3), feddyn_of_the_paper)],
    ids=["scaffold", "feddyn"],
)
def test_it_is_the_papers_algorithm(
    strategy: Strategy, paper: Callable[[Mapping[str, Array], Mapping[str, Gradient]], dict[str, Float64]]
) -> None:
    """With some of the clients in most rounds, and a learning rate of the head's own."""
    start, gradients = unlike()
    clients = {name: Client(gradients[name], RATES, STEPS) for name in NAMES}

    state = rounds(strategy, strategy.init(PAIR, start, 0), clients, COHORTS)

    expected = paper(start, gradients)
    plain = rounds(FFA(), FFA().init(PAIR, start, 0), clients, COHORTS).adapter
    for name, value in expected.items():
        np.testing.assert_allclose(state.adapter[name], value, atol=5e-6)
        assert np.abs(plain[name] - value).max() > 0.05
    np.testing.assert_array_equal(state.adapter["m.A"], start["m.A"])


@pytest.mark.parametrize("strategy", BOTH, ids=["scaffold", "feddyn"])
def test_a_run_of_some_clients_goes_on_from_its_stored_state(strategy: Strategy) -> None:
    start, gradients = unlike()
    clients = {name: Client(gradients[name], RATES, STEPS) for name in NAMES}
    straight = broken = strategy.init(PAIR, start, 0)

    for cohort in COHORTS:
        straight = rounds(strategy, straight, clients, [cohort])
        broken = rounds(replace(strategy), state_from_bytes(state_to_bytes(broken), PAIR), clients, [cohort])  # type: ignore[type-var]

    assert state_to_bytes(broken) == state_to_bytes(straight)


def test_who_comes_new_gets_no_term_and_leaves_the_mean_of_control_variates_what_it_was() -> None:
    strategy, (start, gradients) = SCAFFOLD(), unlike()
    clients = {name: Client(gradients[name], RATES, STEPS) for name in NAMES}
    state = rounds(strategy, strategy.init(PAIR, start, 0), clients, [("ada", "bo")])

    assert strategy.plan(state, 1, "cy").linear == {}
    ada, bo = (strategy.plan(state, 1, name).linear for name in ("ada", "bo"))
    assert ada.keys() == bo.keys() == {"m.B", "head"}
    for name in ada:
        np.testing.assert_allclose(ada[name], -bo[name], atol=1e-6)
        assert np.abs(ada[name]).max() > 0.1


def test_terms_of_a_round_in_which_all_take_part_cancel_by_their_weights() -> None:
    strategy, (start, gradients) = SCAFFOLD(), unlike()
    weights = dict(zip(NAMES, (1.0, 2.0, 5.0, 3.0, 1.0), strict=True))
    clients = {name: Client(gradients[name], RATES, STEPS, weights[name]) for name in NAMES}
    state = rounds(strategy, strategy.init(PAIR, start, 0), clients, COHORTS)

    terms = {name: strategy.plan(state, state.round, name).linear for name in NAMES}

    for tensor in RATES:
        np.testing.assert_allclose(sum(weights[name] * terms[name][tensor] for name in NAMES), 0, atol=1e-5)


@pytest.mark.parametrize("strategy", BOTH, ids=["scaffold", "feddyn"])
def test_no_client_makes_a_term_that_others_would_refuse(strategy: Strategy) -> None:
    """limits.max_weight of a policy is 100; a client that sends all it may would else put the others out of the run."""
    state = strategy.init(PAIR, PAIR.zeros(), 0)
    for _ in range(5):
        updates = []
        for name, size in (("ada", 1e30), ("bo", -1e30), ("cy", 1e-3)):
            plan = strategy.plan(state, state.round, name)
            delta = {each: np.full_like(plan.broadcast[each], size) for each in RATES}
            sums = dict.fromkeys(RATES, 1e-9)
            updates.append(Update(name, 1.0, plan.broadcast, delta, linear=plan.linear, rate_sums=sums))
        state = replace(run_round(strategy, state, updates), adapter=PAIR.zeros())

    plans = [strategy.plan(state, state.round, name) for name in ("ada", "bo", "cy")]
    largest = [max(float(np.abs(each).max()) for each in plan.linear.values()) for plan in plans]
    assert LARGEST <= max(largest) <= 2 * LARGEST == 100


def test_a_round_of_nobody_is_not_committed() -> None:
    for strategy in BOTH:
        with pytest.raises(ProtocolError, match="without updates"):
            strategy.commit(strategy.init(PAIR, PAIR.zeros(), 0), None)


@pytest.mark.parametrize("make", [SCAFFOLD, FedDyn])
@pytest.mark.parametrize(
    ("inner", "why"),
    [
        ("flexlora", "does not declare the trait linear"),
        ("krum", "does not declare the trait linear"),
        ("fedsvd", "rewrites its coordinates or trains other tensors"),
        ("rolora", "rewrites its coordinates or trains other tensors"),
        ("scaffold", "does not declare the trait linear"),
    ],
)
def test_an_inner_strategy_that_remembered_gradients_do_not_fit_is_refused(
    make: Callable[..., Strategy], inner: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=f"{why}.*choose ffa, fedavg or fedpeft|{why}.*Choose ffa"):
        make(inner=inner)


def test_feddyn_has_no_other_server_optimizer_and_a_positive_alpha() -> None:
    with pytest.raises(ConfigError, match="has a server optimizer"):
        FedDyn(inner="fedopt")
    for alpha in (0.0, -1.0, 2e4, float("nan")):
        with pytest.raises(ConfigError, match="above 0 and at most 1e4 is allowed"):
            FedDyn(alpha=alpha)


@pytest.mark.parametrize("strategy", BOTH, ids=["scaffold", "feddyn"])
@pytest.mark.parametrize(
    ("around", "why"),
    [
        (lambda inner: NormBound(inner, 1.0), "which a norm bound scales"),
        (Buffered, "cannot use changes made from an older state"),
        (Refactorize, "which a refactorization turns"),
        (lambda inner: ServerOptimizer(inner, "adam", 0.1), "does not declare the trait linear"),
        (lambda inner: UserLevel(inner, bytes(32), 3, 1.0, 1.0), "does not declare the trait linear"),
        (lambda inner: krum().__class__(inner, krum().rule), "does not declare the trait linear"),
        (lambda inner: Schedule((inner, FedSVD()), lambda commits: commits % 2), "a schedule in which one strategy"),
    ],
    ids=["norm-bound", "buffered", "refactorize", "server-optimizer", "user-level", "robust", "schedule"],
)
def test_what_scales_mixes_or_hides_single_updates_is_refused_around_it(
    strategy: Strategy, around: Callable[[Strategy], Strategy], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        around(strategy)


def test_an_inner_plan_with_momentum_is_refused() -> None:
    class Heavy(Average):
        def plan(self, state: State, round: int, client: str) -> object:  # type: ignore[override]
            return replace(super().plan(state, round, client), local={"momentum": 0.9})

    strategy = ControlVariates(Heavy(select(Role.LORA_B)))
    state = strategy.init(PAIR, PAIR.zeros(), 0)

    with pytest.raises(ConfigError, match="sets momentum, and control variates are read off plain SGD steps"):
        strategy.plan(state, 0, "ada")


def test_both_are_installed() -> None:
    assert isinstance(build("strategies", "scaffold", {"train_head": False}), SCAFFOLD)
    assert isinstance(build("strategies", "feddyn", {"alpha": 0.01, "train_head": True}), FedDyn)
