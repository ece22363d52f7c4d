import copy
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.core.errors import ConfigError, ProtocolError, UpdateRejected
from fedloom.core.privacy.gaussian import UNITS
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.strategies.api import Plan, State, Strategy, Traits, Update
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedpeft import FedPEFT
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.ffa import FFA
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.state import state_from_bytes, state_to_bytes
from fedloom.strategies.transforms.user_level_dp import UserLevel, count_noise

SECRET = bytes(range(32))
OTHER = bytes(range(100, 132))
PAIR = Schema(
    (
        TensorSpec("m.lora_A", "m", Role.LORA_A, (2, 5)),
        TensorSpec("m.lora_B", "m", Role.LORA_B, (4, 2)),
        TensorSpec("head.weight", "head", Role.HEAD, (3, 4)),
        TensorSpec("head.bias", "head", Role.HEAD, (3,)),
    ),
    scale=2.0,
)
WIDE = Schema((TensorSpec("b", "m", Role.BIAS, (300, 500)),))
SCALAR = Schema((TensorSpec("b", "m", Role.BIAS, (1,)),))
QUIET = 1e-9
"""A noise multiplier that leaves the clipped mean as it is but for a step of the grid, S / 2^20."""


def wrapped(inner: Strategy | None = None, **options: Any) -> UserLevel:
    known: dict[str, Any] = {"secret": SECRET, "cohort": 4, "clip_norm": 0.5, "noise_multiplier": QUIET}
    return UserLevel(inner or FedAvg(), **known | options)


def update(strategy: Strategy, state: State, client: str, stream: int, size: float = 1.0) -> Update:
    plan = strategy.plan(state, state.round, client)
    draw = np.random.default_rng([stream, len(client)])
    uploaded = state.schema.select(plan.train).tensors
    delta = {spec.name: draw.normal(0, size, spec.shape).astype(np.float32) for spec in uploaded}
    return Update(client, 1.0, plan.broadcast, delta)


def round_of(strategy: Strategy, state: State, updates: list[Update]) -> State:
    acc = None
    for each in updates:
        acc = strategy.fold(state, acc, each)
    return strategy.commit(state, acc)


def flat(update: Update) -> npt.NDArray[np.float64]:
    return np.concatenate([update.delta[name].ravel().astype(np.float64) for name in sorted(update.delta)])


def apply_mean_delta(before: State, after: State) -> npt.NDArray[np.float64]:
    """The change of the adapter as one vector, tensors in order of name."""
    return np.concatenate(
        [(after.adapter[n].astype(np.float64) - before.adapter[n]).ravel() for n in sorted(before.adapter)]
    )


@pytest.mark.parametrize("mechanism", ["gaussian", "tree"])
def test_the_adapter_moves_by_the_clipped_sum_over_the_cohort(mechanism: str) -> None:
    """One norm over all tensors together, and the denominator is the cohort, not the three that came."""
    strategy = wrapped(mechanism=mechanism, cohort=4)
    state = strategy.init(PAIR, PAIR.zeros(), 0)
    updates = [update(strategy, state, "ada", i, size) for i, size in enumerate((0.01, 0.2, 30.0))]
    expected = np.zeros(PAIR.size)
    for each in updates:
        vector = flat(each)
        norm = np.linalg.norm(vector)
        expected += vector if norm <= 0.5 else vector * 0.5 / norm
    assert [np.linalg.norm(flat(each)) <= 0.5 for each in updates] == [True, False, False]

    after = round_of(strategy, state, updates)

    np.testing.assert_allclose(apply_mean_delta(state, after), expected / 4, rtol=1e-5, atol=6 * 0.5 / UNITS / 4)


INNERS = [FedAvg(), FFA(), FFA(orthonormal=True), FedSVD(), FedSVD(period=2), FedPEFT()]


@pytest.mark.parametrize("inner", INNERS, ids=repr)
def test_a_linear_strategy_commits_what_it_would_without_the_wrapper(inner: Strategy) -> None:
    """Far from the clip norm, with as many clients as the denominator and next to no noise."""
    strategy = wrapped(inner, cohort=3, clip_norm=20.0, noise_multiplier=1e-12)
    adapter = {n: each + np.float32(0.1) for n, each in starting_adapter(PAIR, 1).items()}
    ours, plain = strategy.init(PAIR, adapter, 1), inner.init(PAIR, adapter, 1)
    for stream in range(3):
        updates = [update(inner, plain, client, stream) for client in ("a", "bb", "ccc")]

        ours, plain = round_of(strategy, ours, updates), round_of(inner, plain, updates)

        for name, tensor in plain.adapter.items():
            np.testing.assert_allclose(ours.adapter[name], tensor, rtol=1e-4, atol=1e-4, err_msg=name)
        assert ours.round == plain.round


vectors = st.lists(st.floats(-1e3, 1e3, width=32), min_size=PAIR.size, max_size=PAIR.size)


@settings(max_examples=60, deadline=None)
@given(one=vectors, two=vectors, others=st.integers(0, 3))
def test_one_client_moves_the_mean_by_at_most_its_share(one: list[float], two: list[float], others: int) -> None:
    """At most S / m when it is removed or zeroed and 2 S / m when it is replaced, whatever it sends."""
    strategy = wrapped(cohort=4, clip_norm=0.5)
    state = strategy.init(PAIR, PAIR.zeros(), 0)
    rest = [update(strategy, state, "rest", stream) for stream in range(others)]

    def total(values: list[float] | None) -> npt.NDArray[np.float64]:
        acc = strategy.fold(state, None, update(strategy, state, "first", 9))
        for each in rest:
            acc = strategy.fold(state, acc, each)
        if values is not None:
            parts = np.split(np.array(values, np.float32), np.cumsum([math.prod(s.shape) for s in PAIR.tensors])[:-1])
            delta = {spec.name: part.reshape(spec.shape) for spec, part in zip(PAIR.tensors, parts, strict=True)}
            acc = strategy.fold(state, acc, Update("mine", 1.0, PAIR.zeros(), delta))
        return np.concatenate([acc.total[name].ravel() for name in sorted(acc.total)]) / UNITS * 0.5 / 4

    absent, zero, mine, replaced = total(None), total([0.0] * PAIR.size), total(one), total(two)

    np.testing.assert_array_equal(absent, zero)
    assert np.linalg.norm(mine - absent) <= 0.5 / 4 * (1 + 1e-9)
    assert np.linalg.norm(mine - replaced) <= 2 * 0.5 / 4 * (1 + 1e-9)


@pytest.mark.parametrize("options", [{}, {"mechanism": "tree"}, {"target_quantile": 0.5}], ids=str)
def test_noise_on_the_mean_has_the_deviation_that_is_accounted(options: dict[str, Any]) -> None:
    strategy = wrapped(cohort=8, clip_norm=0.25, noise_multiplier=1.5, **options)
    state = strategy.init(WIDE, WIDE.zeros(), 0)
    silent = Update("ada", 1.0, WIDE.zeros(), WIDE.zeros())

    change = apply_mean_delta(state, round_of(strategy, state, [silent]))

    multiplier = 1.5 if "target_quantile" not in options else count_noise(1.5, 8)[0]
    # 150,000 coordinates: the standard error of the deviation is 0.18 %.
    assert change.std() == pytest.approx(multiplier * 0.25 / 8, rel=0.01)
    assert abs(change.mean()) < 5 * change.std() / np.sqrt(change.size)


def test_gaussian_noise_is_fresh_in_every_round_and_tensor() -> None:
    strategy = wrapped(noise_multiplier=1.0, clip_norm=1.0)
    state = strategy.init(PAIR, PAIR.zeros(), 0)
    changes = []
    for _ in range(400):
        after = round_of(strategy, state, [Update("ada", 1.0, PAIR.zeros(), PAIR.zeros())])
        changes.append(apply_mean_delta(state, after))
        state = after

    correlation = np.corrcoef(np.array(changes), rowvar=False) - np.eye(PAIR.size)
    assert abs(correlation).max() < 5 / np.sqrt(400)
    steps = np.array(changes).ravel()
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1]) < 5 / np.sqrt(steps.size)


def test_tree_noise_has_the_covariance_of_the_dense_factorisation() -> None:
    """Prefix sums over 13 rounds carry z^2 B B^T, B being the dense matrix of prefixes from nodes."""
    rounds, z, cohort = 13, 1.5, 5
    strategy = wrapped(mechanism="tree", noise_multiplier=z, clip_norm=1.0, cohort=cohort)
    state = strategy.init(WIDE, WIDE.zeros(), 0)
    prefixes = []
    for _ in range(rounds):
        state = round_of(strategy, state, [Update("ada", 1.0, WIDE.zeros(), WIDE.zeros())])
        prefixes.append(state.adapter["b"].ravel().astype(np.float64) * cohort / z)
    nodes: dict[tuple[int, int], int] = {}
    used = []
    for end in range(1, rounds + 1):
        start, mine = 0, []
        for level in reversed(range(4)):
            if end >> level & 1:
                mine.append(nodes.setdefault((start, level), len(nodes)))
                start += 2**level
        used.append(mine)
    b = np.zeros((rounds, len(nodes)))
    for row, mine in enumerate(used):
        b[row, mine] = 1

    measured = np.cov(np.array(prefixes))

    np.testing.assert_allclose(measured, b @ b.T, atol=0.03)


def test_tree_sums_are_exact_between_their_noises() -> None:
    """The tree only changes the noise: what clients contributed adds up as without it."""
    ends = []
    for mechanism in ("gaussian", "tree"):
        strategy = wrapped(mechanism=mechanism, noise_multiplier=1e-12, clip_norm=1.0)
        state = strategy.init(PAIR, PAIR.zeros(), 0)
        for stream in range(9):
            state = round_of(strategy, state, [update(FedAvg(), state, client, stream) for client in ("a", "bb")])
        ends.append(apply_mean_delta(strategy.init(PAIR, PAIR.zeros(), 0), state))

    np.testing.assert_allclose(ends[0], ends[1], atol=1e-4)  # nine rounds of noise of a step or two, S / 2^20 each


def test_clip_norm_shrinks_when_more_than_the_target_are_within_and_grows_otherwise() -> None:
    """S exp(-rate (b - target)), with the sign that is often wrong: 1 within gives exp(-0.1), none gives exp(0.1)."""
    for size, share in ((0.0, 1.0), (100.0, 0.0)):
        strategy = wrapped(cohort=1000, noise_multiplier=QUIET, target_quantile=0.5, clip_norm=2.0)
        state = strategy.init(SCALAR, SCALAR.zeros(), 0)
        delta = {"b": np.array([size], np.float32)}
        after = round_of(strategy, state, [Update(str(i), 1.0, SCALAR.zeros(), delta) for i in range(1000)])

        # The count's noise of 1000 / 20 moves the share by 0.05 and the exponent by 0.01, one standard deviation.
        expected = 2.0 * math.exp(-0.2 * (share - 0.5))
        assert float(after.memory["user_level/clip_norm"]) == pytest.approx(expected, rel=0.05)
        assert (after.memory["user_level/clip_norm"] < 2.0) == (share == 1.0)


@pytest.mark.parametrize(("target", "start"), [(0.5, 0.1), (0.8, 0.1), (0.5, 100.0)])
def test_clip_norm_settles_at_the_quantile_of_the_norms(target: float, start: float) -> None:
    strategy = wrapped(cohort=40, noise_multiplier=1.0, target_quantile=target, clip_norm=start)
    state = strategy.init(SCALAR, SCALAR.zeros(), 0)
    draw = np.random.default_rng(4)
    tail = []
    for number in range(160):
        norms = draw.lognormal(1.0, 0.5, 40).astype(np.float32)
        updates = [Update(str(i), 1.0, SCALAR.zeros(), {"b": norms[i : i + 1]}) for i in range(40)]
        state = round_of(strategy, state, updates)
        if number >= 80:
            tail.append(float(state.memory["user_level/clip_norm"]))

    quantile = {0.5: math.exp(1.0), 0.8: math.exp(1.0 + 0.5 * 0.8416212)}[target]
    assert np.exp(np.mean(np.log(tail))) == pytest.approx(quantile, rel=0.06)


def test_the_share_of_a_round_that_is_short_counts_the_missing_as_half() -> None:
    strategy = wrapped(cohort=10**6, noise_multiplier=1.0, target_quantile=0.5, clip_norm=2.0)
    state = strategy.init(SCALAR, SCALAR.zeros(), 0)

    after = round_of(strategy, state, [Update("ada", 1.0, SCALAR.zeros(), SCALAR.zeros())])

    assert float(after.memory["user_level/clip_norm"]) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize(("noise", "cohort"), [(0.5, 100), (1.0, 4), (3.0, 1000), (20.0, 50)])
def test_sum_and_count_together_cost_what_one_gaussian_of_the_multiplier_costs(noise: float, cohort: int) -> None:
    on_sum, on_count = count_noise(noise, cohort)
    # A centred count moves by 1/2 for one client, so its noise multiplier is twice its deviation.
    joint, single = RdpAccountant(), RdpAccountant()
    joint.compose(SelfComposedDpEvent(GaussianDpEvent(on_sum), 10)).compose(
        SelfComposedDpEvent(GaussianDpEvent(2 * on_count), 10)
    )
    single.compose(SelfComposedDpEvent(GaussianDpEvent(noise), 10))

    assert joint.get_epsilon(1e-6) == pytest.approx(single.get_epsilon(1e-6), rel=1e-9)
    assert noise < on_sum <= 1.16 * noise


@dataclass(frozen=True)
class Median(FedAvg):
    traits: ClassVar[Traits] = Traits(same_tensors=True)


class Undeclared(Strategy):
    def init(self, *_: Any) -> Any: ...
    def plan(self, *_: Any) -> Any: ...
    def fold(self, *_: Any) -> Any: ...
    def commit(self, *_: Any) -> Any: ...


@pytest.mark.parametrize(
    ("inner", "options", "words"),
    [
        (Median(), {}, "Median does not declare the trait linear"),
        (Undeclared(), {}, "Undeclared does not declare the trait linear"),
        (wrapped(), {}, "UserLevel does not declare the trait linear"),
        (FedSVD(), {"mechanism": "tree"}, "FedSVD rewrites its coordinates"),
        (FedAvg(), {"mechanism": "tree", "target_quantile": 0.5}, "needs a fixed clip norm"),
        (FedAvg(), {"cohort": 0}, "cohort 0"),
        (FedAvg(), {"clip_norm": 0.0}, "positive numbers"),
        (FedAvg(), {"noise_multiplier": math.nan}, "positive numbers"),
        (FedAvg(), {"noise_multiplier": math.inf}, "positive numbers"),
        (FedAvg(), {"secret": b"short"}, "secret of 5 bytes"),
        (FedAvg(), {"target_quantile": 1.0}, "must lie in"),
    ],
)
def test_what_has_no_guarantee_is_refused(inner: Strategy, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        wrapped(inner, **options)


@pytest.mark.parametrize("weight", [2.0, 0.5, 1.0 + 1e-9])
def test_weights_other_than_one_are_refused(weight: float) -> None:
    strategy = wrapped()
    state = strategy.init(PAIR, PAIR.zeros(), 0)

    with pytest.raises(UpdateRejected, match="uniform"):
        strategy.fold(state, None, replace(update(strategy, state, "ada", 0), weight=weight))


def test_a_round_without_updates_is_refused() -> None:
    strategy = wrapped()
    with pytest.raises(ProtocolError, match="without updates"):
        strategy.commit(strategy.init(PAIR, PAIR.zeros(), 0), None)


@pytest.mark.parametrize("mechanism", ["gaussian", "tree"])
def test_a_replay_repeats_the_noise_and_other_updates_get_other_noise(mechanism: str) -> None:
    """Two continuations of one state must not share noise, or their difference would be a client's update in clear."""
    strategy = wrapped(mechanism=mechanism, noise_multiplier=1.0)
    state = strategy.init(PAIR, PAIR.zeros(), 0)
    common = [update(strategy, state, "ada", 0)]
    state = round_of(strategy, state, common)
    own = [*common, update(strategy, state, "bo", 1, 1e-6)]

    once, again = (round_of(wrapped(mechanism=mechanism, noise_multiplier=1.0), state, common) for _ in range(2))
    forked = round_of(strategy, state, own)

    assert state_to_bytes(once) == state_to_bytes(again)
    assert np.linalg.norm(apply_mean_delta(once, forked)) > 0.05, "the fork released the same noise"


def test_a_resumed_run_goes_on_with_its_own_secret() -> None:
    """A restart brings a new instance with a new secret; the stored one decides, or a replay would differ."""
    strategy = wrapped(mechanism="tree", noise_multiplier=1.0)
    state = strategy.init(PAIR, PAIR.zeros(), 0)
    for stream in range(5):
        restored = state_from_bytes(state_to_bytes(state), PAIR)
        other = wrapped(mechanism="tree", noise_multiplier=1.0, secret=OTHER)
        updates = [update(strategy, state, client, stream) for client in ("a", "bb")]

        state, resumed = round_of(strategy, state, updates), round_of(other, restored, updates)

        assert state_to_bytes(state) == state_to_bytes(resumed)


def test_noise_depends_on_the_secret_and_not_on_the_public_seed() -> None:
    silent = [Update("ada", 1.0, PAIR.zeros(), PAIR.zeros())]

    def first(secret: bytes, seed: int) -> npt.NDArray[np.float64]:
        strategy = wrapped(noise_multiplier=1.0, secret=secret)
        state = strategy.init(PAIR, PAIR.zeros(), seed)
        return apply_mean_delta(state, round_of(strategy, state, silent))

    np.testing.assert_array_equal(first(SECRET, 0), first(SECRET, 1))
    assert abs(np.corrcoef(first(SECRET, 0), first(OTHER, 0))[0, 1]) < 0.9


def test_plans_hold_nothing_of_the_secret() -> None:
    """Before the first noise two secrets give the same plan to the byte; afterwards only the adapter differs."""
    plans: dict[bytes, list[Plan]] = {}
    for secret in (SECRET, OTHER):
        strategy = wrapped(secret=secret, noise_multiplier=1.0)
        state = strategy.init(PAIR, starting_adapter(PAIR, 0), 0)
        plans[secret] = [strategy.plan(state, 0, "ada")]
        state = round_of(strategy, state, [update(strategy, state, "ada", 0)])
        plans[secret].append(strategy.plan(state, 1, "ada"))
        assert state_to_bytes(state).count(secret) == 1  # or the search below would find nothing anyway
        assert repr(secret) not in repr(strategy)

    for one, two in zip(plans[SECRET], plans[OTHER], strict=True):
        assert replace(one, broadcast={}) == replace(two, broadcast={})
        for plan, secret in ((one, SECRET), (two, OTHER)):
            assert plan.broadcast.keys() == {spec.name for spec in PAIR.tensors}
            assert not any(secret in tensor.tobytes() for tensor in plan.broadcast.values())
    for name, tensor in plans[SECRET][0].broadcast.items():
        np.testing.assert_array_equal(tensor, plans[OTHER][0].broadcast[name])


def test_every_client_gets_the_plan_of_nobody_in_particular() -> None:
    @dataclass(frozen=True)
    class Favouring(FedAvg):
        def plan(self, state: State, round: int, client: str) -> Plan:
            return replace(super().plan(state, round, client), local={"learning_rate": float(len(client))})

    strategy = wrapped(Favouring())
    state = strategy.init(PAIR, PAIR.zeros(), 0)

    assert strategy.plan(state, 0, "ada").local == strategy.plan(state, 0, "barbara").local


def test_the_inner_strategy_keeps_its_own_memory_and_sees_none_of_ours() -> None:
    @dataclass(frozen=True)
    class Momentum(FedAvg):
        def commit(self, state: State, acc: Any) -> State:
            after = super().commit(state, acc)
            assert set(state.memory) <= {"count"}
            return replace(after, memory={"count": np.array(after.round)})

    strategy = wrapped(Momentum())
    state = strategy.init(PAIR, PAIR.zeros(), 0)
    for _ in range(3):
        before = copy.deepcopy(state.memory)
        state = round_of(strategy, state, [update(strategy, state, "ada", 0)])

        assert int(state.memory["count"]) == state.round
        np.testing.assert_array_equal(state.memory["user_level/secret"], before["user_level/secret"])
