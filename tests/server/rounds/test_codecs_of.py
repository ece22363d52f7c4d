"""Which codecs a run works with, from its size and its strategy."""

from collections.abc import Callable

import pytest

from fedloom.core.config.run import RunConfig
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.core.secagg.steps import MASKED
from fedloom.server.build import build_strategy
from fedloom.server.rounds.broadcast import codecs_of


def of(values: int) -> Schema:
    return Schema((TensorSpec("m.B", "m", Role.LORA_B, (values, 1)), TensorSpec("m.A", "m", Role.LORA_A, (1, 8))))


@pytest.mark.parametrize(
    ("strategy", "values", "sections", "names"),
    [
        ("fedavg", 1000, {}, ("fp32", "fp32")),
        ("fedavg", 300_000, {}, ("eden4", "eden4")),
        ("median", 300_000, {}, ("eden4", "fp32")),  # it broadcasts the adapter itself
        ("median", 300_000, {"wire": {"broadcast": "bf16"}}, ("eden4", "bf16")),
        ("fedavg", 300_000, {"wire": {"upload": "eden2", "broadcast": "int8"}}, ("eden2", "int8")),
        ("fedavg", 300_000, {"secure_aggregation": {"enabled": True}}, (MASKED, "eden4")),
    ],
)
def test_size_and_strategy_decide_what_a_run_leaves_open(
    configure: Callable[..., RunConfig],
    strategy: str,
    values: int,
    sections: dict[str, dict[str, object]],
    names: tuple[str, str],
) -> None:
    config = configure(strategy={"name": strategy}, **sections)

    assert codecs_of(config, of(values), build_strategy(config)) == names
