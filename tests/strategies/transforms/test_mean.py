import numpy as np
import pytest

from fedloom.core.errors import ProtocolError, SchemaError, UpdateRejected
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.strategies.api import Update
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedpeft import FedPEFT
from fedloom.strategies.ffa import FFA
from fedloom.strategies.transforms.average import apply_mean_delta, begin, fold, mean, trained

BIAS = Schema((TensorSpec("b", "m", Role.BIAS, (2,)),))
PAIR_AND_HEAD = Schema(
    (
        TensorSpec("a", "m", Role.LORA_A, (2, 3)),
        TensorSpec("b", "m", Role.LORA_B, (4, 2)),
        TensorSpec("h", "head", Role.HEAD, (2, 4)),
    )
)


def _update(values: list[float], weight: float = 1.0, client: str = "ada") -> Update:
    return Update(client, weight, BIAS.zeros(), {"b": np.array(values, np.float32)})


def test_weights_of_a_quarter_and_three_quarters() -> None:
    acc = fold(BIAS, None, _update([4.0, -8.0], weight=25))
    acc = fold(BIAS, acc, _update([8.0, 8.0], weight=75))

    # 0.25 * 4 + 0.75 * 8 and 0.25 * -8 + 0.75 * 8
    np.testing.assert_array_equal(mean(acc)["b"], [7.0, 4.0])


def test_fedavg_moves_by_a_quarter_of_one_client_and_three_quarters_of_the_other() -> None:
    strategy, adapter = FedAvg(), {"b": np.array([1.0, -2.0], np.float32)}
    state, acc = strategy.init(BIAS, adapter, 0), None
    for client, weight, values in (("ada", 25.0, [4.0, -8.0]), ("bo", 75.0, [8.0, 8.0])):
        delta = {"b": np.array(values, np.float32)}
        acc = strategy.fold(state, acc, Update(client, weight, strategy.plan(state, 0, client).broadcast, delta))

    # 1 + 0.25 * 4 + 0.75 * 8 and -2 + 0.25 * -8 + 0.75 * 8
    np.testing.assert_array_equal(strategy.commit(state, acc).adapter["b"], [8.0, 2.0])


def test_many_small_changes_do_not_drown_in_a_large_one() -> None:
    """A running float32 sum would lose every change of 1 beside 2**25."""
    acc = fold(BIAS, None, _update([2.0**25, 0.0]))
    for index in range(1023):
        acc = fold(BIAS, acc, _update([1.0, 0.0], client=str(index)))

    assert mean(acc)["b"][0] == (2.0**25 + 1023) / 1024


def test_adapter_moves_by_the_mean_and_untrained_tensors_stay() -> None:
    adapter = {"b": np.array([1.0, 2.0], np.float32), "frozen": np.array([5.0], np.float32)}

    after = apply_mean_delta(adapter, fold(BIAS, None, _update([0.5, -2.0])))

    np.testing.assert_array_equal(after["b"], [1.5, 0.0])
    assert after["frozen"] is adapter["frozen"]
    assert after["b"].dtype == np.float32


def test_largest_accepted_changes_and_weights_do_not_overflow() -> None:
    acc = None
    for index in range(4):
        acc = fold(BIAS, acc, _update([1e30, -1e30], weight=1e15, client=str(index)))

    assert np.isfinite(apply_mean_delta(BIAS.zeros(), acc)["b"]).all()
    with pytest.raises(UpdateRejected, match="beyond 1e\\+30 in 'b'"):
        fold(BIAS, None, _update([0.0, 1.1e30]))


def test_a_round_without_updates_is_refused() -> None:
    state = FedAvg().init(BIAS, BIAS.zeros(), 0)

    with pytest.raises(ProtocolError, match="without updates"):
        FedAvg().commit(state, None)


def test_start_must_be_finite_float32_of_the_schema() -> None:
    with pytest.raises(SchemaError, match="float64"):
        begin(BIAS, {"b": np.zeros(2)}, 0)
    with pytest.raises(SchemaError, match="NaN"):
        begin(BIAS, {"b": np.array([0.0, np.nan], np.float32)}, 0)
    with pytest.raises(SchemaError, match="shape"):
        begin(BIAS, {"b": np.zeros(3, np.float32)}, 0)


def test_head_policy_decides_about_the_head_alone() -> None:
    roles = {Role.LORA_B}

    assert trained(PAIR_AND_HEAD, roles, head=True).roles == {Role.LORA_B, Role.HEAD}
    assert trained(PAIR_AND_HEAD, roles, head=False).roles == {Role.LORA_B}


def test_a_frozen_head_is_broadcast_but_not_expected_back() -> None:
    strategy = FedAvg(train_head=False)
    state = strategy.init(PAIR_AND_HEAD, PAIR_AND_HEAD.zeros(), 0)

    plan = strategy.plan(state, 0, "ada")

    assert plan.train == {Role.LORA_A, Role.LORA_B}
    assert "h" in plan.broadcast
    with pytest.raises(SchemaError, match="1 unexpected"):
        strategy.fold(state, None, Update("ada", 1.0, plan.broadcast, PAIR_AND_HEAD.zeros()))


def test_schemas_a_strategy_cannot_serve_are_refused() -> None:
    head_only = PAIR_AND_HEAD.select({Role.HEAD})
    with pytest.raises(SchemaError, match=r"trains lora_B, but the adapter has bias; change adapter\.kind"):
        FFA().init(BIAS, BIAS.zeros(), 0)
    with pytest.raises(SchemaError, match="nothing to train"):
        FedAvg(train_head=False).init(head_only, head_only.zeros(), 0)
    with pytest.raises(SchemaError, match="trains lora_A, lora_B"):
        FedPEFT(kind="lora").init(BIAS, BIAS.zeros(), 0)
