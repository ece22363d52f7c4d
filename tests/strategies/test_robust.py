"""Robust rules against their definitions in dense numpy, and what they bear and refuse."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from fedloom.core.errors import ConfigError, ProtocolError, UpdateRejected
from fedloom.core.registry import build
from fedloom.core.schema import LORA, Role, Schema, TensorSpec
from fedloom.strategies.api import Plan, Strategy, Update
from fedloom.strategies.conformance import StrategyConformance, effective, respond, run_round
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.ffa import FFA
from fedloom.strategies.robust.bulyan import BULYAN, bulyan
from fedloom.strategies.robust.coordinate import MEDIAN, TRIMMED_MEAN, median, trimmed_mean
from fedloom.strategies.robust.krum import KRUM, MULTI_KRUM, krum, multi_krum
from fedloom.strategies.robust.rule import Robust, Rule
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.transforms.user_level_dp import UserLevel

Float64 = npt.NDArray[np.float64]
SCALAR = Schema((TensorSpec("b", "m", Role.BIAS, (1,)),))
RULES = {rule.name: rule for rule in (MEDIAN, TRIMMED_MEAN, KRUM, MULTI_KRUM, BULYAN)}
BY_COORDINATE = [rule for rule in RULES.values() if rule.by_coordinate]
LEAST = {
    "coordinate-wise median": (2, 1),
    "trimmed mean": (2, 1),
    "Krum": (2, 3),
    "Multi-Krum": (2, 3),
    "Bulyan": (4, 3),
}


def around(rule: Rule, num_byzantine: int = 1, inner: Strategy | None = None) -> Robust:
    return Robust(inner or FedAvg(), rule, num_byzantine)


def of(values: Sequence[float]) -> list[Update]:
    zero = SCALAR.zeros()
    return [Update(f"c{k:02d}", 1.0, zero, {"b": np.array([each], np.float32)}) for k, each in enumerate(values)]


def result(rule: Rule, num_byzantine: int, values: Sequence[float]) -> float:
    strategy = around(rule, num_byzantine)
    after = run_round(strategy, strategy.init(SCALAR, SCALAR.zeros(), 0), of(values))
    return float(after.adapter["b"][0])


def naive_scores(points: Float64, num_byzantine: int) -> list[float]:
    """Krum's scores as the paper writes them, with loops."""
    found = []
    for i, one in enumerate(points):
        off = sorted(float(np.sum((one - other) ** 2)) for j, other in enumerate(points) if j != i)
        found.append(sum(off[: max(1, len(points) - num_byzantine - 2)]))
    return found


def naive(rule: Rule, points: Float64, num_byzantine: int) -> Float64:
    """What a rule makes of points, shape (n, d), written another way than in the package."""
    count = len(points)
    scored = naive_scores(points, num_byzantine)
    if rule is MEDIAN:
        middle = np.sort(points, axis=0)
        return np.asarray((middle[(count - 1) // 2] + middle[count // 2]) / 2)
    if rule is TRIMMED_MEAN:
        return np.array([np.mean(sorted(column)[num_byzantine : count - num_byzantine]) for column in points.T])
    if rule is KRUM:
        return np.asarray(points[scored.index(min(scored))])
    if rule is MULTI_KRUM:
        limit = sorted(scored)[count - num_byzantine - 1]
        return np.asarray(np.mean([p for p, s in zip(points, scored, strict=True) if s <= limit], axis=0))
    left = list(points)
    chosen: list[Float64] = []
    while len(chosen) < count - 2 * num_byzantine:
        again = naive_scores(np.array(left), num_byzantine)
        rivals = [k for k, s in enumerate(again) if s == min(again)]
        spread = [float(sum(np.sum((left[k] - other) ** 2) for other in left)) for k in rivals]
        chosen.append(left.pop(rivals[spread.index(min(spread))]))
    columns = []
    for column in np.array(chosen).T:
        near = sorted(column, key=lambda value: abs(value - np.median(column)))
        columns.append(np.mean(near[: len(chosen) - 2 * num_byzantine]))
    return np.array(columns)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("count", [7, 8, 9, 10, 11])
def test_scalars_give_what_the_definition_says(rule: Rule, count: int) -> None:
    """Honest values near 1 and as many at a million as the count allows: the result is an honest one's neighbour."""
    per_faulty, plus = LEAST[rule.name]
    for num_byzantine in range(1, (count - plus) // per_faulty + 1):
        draw = np.random.default_rng([count, num_byzantine])
        honest = 1 + 0.1 * draw.normal(size=count - num_byzantine)
        values = [*honest, *([1e6] * num_byzantine)]
        order = draw.permutation(count)
        points = np.array(values, np.float32).astype(np.float64)[order][:, None]

        found = result(rule, num_byzantine, points[:, 0].tolist())

        assert found == pytest.approx(float(naive(rule, points, num_byzantine)[0]), rel=1e-6)
        assert honest.min() - 1e-6 <= found <= honest.max() + 1e-6
        if rule is KRUM:
            assert np.abs(points - found).min() < 1e-7


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("num_byzantine", [1, 2])
def test_vectors_give_what_the_definition_says(rule: Rule, num_byzantine: int) -> None:
    """On B with a shared A, and a head: points are the model's weights for choices, the values for coordinates."""
    schema = TestKrumOnBothFactors().schema()
    inner = FFA(orthonormal=True)
    strategy = around(rule, num_byzantine, inner)
    state = strategy.init(schema, starting_adapter(schema, 3), 3)
    plan = strategy.plan(state, 0, "x")
    updates = [respond(schema, plan, f"c{k:02d}", k) for k in range(11)]
    names = sorted(updates[0].delta)
    # A is orthonormal, so that with scale s on B the values and the model have the same distances.
    factor = {name: schema.scale if name.endswith("lora_B") else 1.0 for name in names}
    points = np.stack(
        [np.concatenate([factor[n] * u.delta[n].ravel().astype(np.float64) for n in names]) for u in updates]
    )

    after = run_round(strategy, state, updates)

    moved = np.concatenate(
        [factor[n] * (after.adapter[n].astype(np.float64) - state.adapter[n]).ravel() for n in names]
    )
    np.testing.assert_allclose(moved, naive(rule, points, num_byzantine), atol=1e-5)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_too_few_updates_are_refused_at_commit(rule: Rule) -> None:
    per_faulty, plus = LEAST[rule.name]
    for num_byzantine in (1, 2):
        least = per_faulty * num_byzantine + plus
        assert around(rule, num_byzantine).traits.least_updates == least
        assert np.isfinite(result(rule, num_byzantine, np.arange(least).tolist()))
        with pytest.raises(
            ProtocolError, match=rf"needs {least} updates and got {least - 1}; raise rounds.min_clients"
        ):
            result(rule, num_byzantine, np.arange(least - 1).tolist())
        strategy = around(rule, num_byzantine)
        with pytest.raises(ProtocolError, match="got 0"):
            strategy.commit(strategy.init(SCALAR, SCALAR.zeros(), 0), None)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_weights_buy_nothing(rule: Rule) -> None:
    strategy = around(rule)
    state = strategy.init(SCALAR, SCALAR.zeros(), 0)
    updates = of([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 100.0])

    plain = run_round(strategy, state, updates)
    bought = run_round(strategy, state, [*updates[:-1], replace(updates[-1], weight=1e12)])

    np.testing.assert_array_equal(bought.adapter["b"], plain.adapter["b"])


@pytest.mark.parametrize("rule", BY_COORDINATE, ids=lambda rule: rule.name)
def test_coordinates_of_two_moving_factors_are_refused(rule: Rule) -> None:
    schema = TestKrumOnBothFactors().schema()

    with pytest.raises(ConfigError, match=r"FedAvg trains both factors.*such as ffa or fedsvd"):
        around(rule).init(schema, schema.zeros(), 0)

    for inner in (FFA(), FedSVD(), FedAvg()):
        part = schema if not isinstance(inner, FedAvg) else schema.select({Role.HEAD})
        around(rule, 1, inner).init(part, starting_adapter(part, 0), 0)


def test_krum_takes_the_same_client_however_it_writes_its_product() -> None:
    """Without products the choice changes: raw factors of these clients are far apart, their models are not."""
    schema = TestKrumOnBothFactors().schema()
    strategy = krum(num_byzantine=1, inner="fedavg")
    draw = np.random.default_rng(4)
    begin = {n: draw.normal(size=t.shape).astype(np.float32) for n, t in schema.zeros().items()}
    state = strategy.init(schema, begin, 0)
    updates = [respond(schema, strategy.plan(state, 0, "x"), f"c{k}", k) for k in range(6)]
    turned = []
    for update in updates:
        delta = dict(update.delta)
        for pair in schema.pairs:
            gauge = draw.normal(size=(3, 3)) + 3 * np.eye(3)
            b, a = update.value(pair.b) @ np.linalg.inv(gauge), gauge @ update.value(pair.a)
            delta[pair.b], delta[pair.a] = (
                (value - begin[name]).astype(np.float32) for name, value in ((pair.b, b), (pair.a, a))
            )
        turned.append(replace(update, delta=delta))

    first, second = (effective(schema, run_round(strategy, state, each).adapter) for each in (updates, turned))

    for name, tensor in first.items():
        np.testing.assert_allclose(second[name], tensor, atol=1e-4)
    flat = np.stack([np.concatenate([t.ravel() for t in u.delta.values()]) for u in turned]).astype(np.float64)
    raw = updates[int(np.argmin(naive_scores(flat, 1)))]
    chosen = effective(schema, {n: raw.value(n).astype(np.float32) for n in raw.delta})
    assert max(np.abs(chosen[n] - first[n]).max() for n in first) > 0.1


def test_krum_commits_the_chosen_update_to_the_bit() -> None:
    schema = TestKrumOnBothFactors().schema()
    strategy = krum(inner="fedavg")
    state = strategy.init(schema, schema.zeros(), 0)
    updates = [respond(schema, strategy.plan(state, 0, "x"), f"c{k}", k) for k in range(5)]
    updates[3] = replace(updates[3], delta={n: np.full_like(t, 1e6) for n, t in updates[3].delta.items()})

    after = run_round(strategy, state, updates).adapter

    same = [all(np.array_equal(after[n], t) for n, t in u.delta.items()) for u in updates]
    assert sum(same) == 1
    assert not same[3]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: krum(num_byzantine=0), "Krum against 0 false updates; set num_byzantine to 1 or more"),
        (lambda: bulyan(inner="nosuch"), "unknown strategy 'nosuch'"),
        (lambda: median(inner="krum"), "Robust does not declare the trait linear; coordinate-wise median hands"),
        (
            lambda: build("strategies", "multi-krum", {"num_byzantine": 1.5}),
            "option 'num_byzantine' of strategy 'multi-krum' is 1.5",
        ),
        (
            lambda: UserLevel(trimmed_mean(), bytes(32), 3, 1.0, 1.0),
            "Robust does not declare the trait linear; user-level",
        ),
    ],
)
def test_what_means_nothing_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_false_update_is_refused_when_it_comes() -> None:
    strategy = multi_krum(inner="fedavg")
    state = strategy.init(SCALAR, SCALAR.zeros(), 0)

    with pytest.raises(UpdateRejected, match="NaN"):
        strategy.fold(state, None, of([np.nan])[0])


class TestKrumOnBothFactors(StrategyConformance):
    def strategy(self) -> Strategy:
        return krum(inner="fedavg")

    def test_both_factors_are_trained(self) -> None:
        strategy, state = self.begin()

        assert strategy.plan(state, 0, "ada").train >= LORA


class TestOthers(StrategyConformance):
    @pytest.fixture(
        autouse=True,
        params=[
            lambda: bulyan(num_byzantine=2, inner="fedsvd"),
            lambda: trimmed_mean(num_byzantine=2, inner="fedsvd", train_head=False),
            lambda: around(MEDIAN, 1, FFA(orthonormal=True)),
            lambda: multi_krum(num_byzantine=2, inner="fedpeft"),
        ],
    )
    def _make(self, request: pytest.FixtureRequest) -> None:
        self.make: Callable[[], Strategy] = request.param

    def strategy(self) -> Strategy:
        return self.make()


def test_a_plan_with_personal_factors_shares_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both factors trained but one kept at home: what is compared has one set of coordinates."""
    schema = TestKrumOnBothFactors().schema()
    inner = FedAvg()
    state = inner.init(schema, schema.zeros(), 0)
    plan = Plan(train=LORA, broadcast=state.adapter, personal=frozenset({Role.LORA_B}))
    monkeypatch.setattr(FedAvg, "plan", lambda *_: plan)

    assert around(MEDIAN, 1, inner).plan(state, 0, "ada") is plan
