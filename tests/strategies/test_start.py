import subprocess
import sys

import numpy as np
import pytest

from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.ffa import FFA
from fedloom.strategies.lowrank import orthonormal_rows
from fedloom.strategies.start import starting_adapter


def _roberta_large(rank: int = 8) -> Schema:
    """LoRA on query and value of RoBERTa-large: 24 layers of width 1024."""
    specs = []
    for layer in range(24):
        for target in ("query", "value"):
            module = f"roberta.encoder.layer.{layer}.attention.self.{target}"
            specs.append(TensorSpec(f"{module}.lora_A", module, Role.LORA_A, (rank, 1024)))
            specs.append(TensorSpec(f"{module}.lora_B", module, Role.LORA_B, (1024, rank)))
    return Schema(tuple(specs))


SMALL = Schema(
    (
        TensorSpec("q.A", "q", Role.LORA_A, (4, 25)),
        TensorSpec("q.B", "q", Role.LORA_B, (6, 4)),
        TensorSpec("v.A", "v", Role.LORA_A, (4, 25)),
        TensorSpec("v.B", "v", Role.LORA_B, (6, 4)),
        TensorSpec("q.bias", "q", Role.BIAS, (6,)),
        TensorSpec("head.weight", "head", Role.HEAD, (50, 40)),
        TensorSpec("head.bias", "head", Role.HEAD, (50,)),
    )
)


def test_roles_start_where_the_papers_start_them() -> None:
    adapter = starting_adapter(SMALL, 3)

    SMALL.check(adapter)
    for name in ("q.B", "v.B", "q.bias", "head.bias"):
        np.testing.assert_array_equal(adapter[name], 0)
    assert all(tensor.dtype == np.float32 for tensor in adapter.values())
    bound = 1 / np.sqrt(25)
    assert np.abs(adapter["q.A"]).max() <= bound
    assert np.abs(adapter["q.A"]).max() > 0.9 * bound  # 100 draws: P(all below) = 0.9**100 < 3e-5
    # Standard error of a standard deviation over n = 2000 normal draws: 0.02 / sqrt(2 n) = 3e-4; five of them.
    assert np.std(adapter["head.weight"]) == pytest.approx(0.02, abs=1.6e-3)


def test_tensors_of_one_shape_and_other_seeds_differ() -> None:
    first, second = starting_adapter(SMALL, 3), starting_adapter(SMALL, 4)

    assert not np.array_equal(first["q.A"], first["v.A"])
    assert not np.array_equal(first["q.A"], second["q.A"])


def test_the_largest_seed_of_a_run_is_usable_and_repeatable() -> None:
    first, second = (starting_adapter(SMALL, 2**63 - 1) for _ in range(2))

    for name, tensor in first.items():
        np.testing.assert_array_equal(second[name], tensor)


def test_no_stream_is_shared_with_what_a_strategy_draws() -> None:
    adapter = starting_adapter(SMALL, 3)

    own = np.random.Generator(np.random.Philox(key=[3, 0])).uniform(-0.2, 0.2, (4, 25)).astype(np.float32)

    assert not np.array_equal(adapter["q.A"], own)


def test_orthonormal_ffa_keeps_the_row_space_and_starts_at_the_base_model() -> None:
    adapter = starting_adapter(SMALL, 3)

    state = FFA(orthonormal=True).init(SMALL, adapter, 3)

    np.testing.assert_allclose(state.adapter["q.A"], orthonormal_rows(adapter["q.A"]), atol=1e-7)
    np.testing.assert_array_equal(state.adapter["q.B"], 0)
    np.testing.assert_array_equal(state.adapter["head.weight"], adapter["head.weight"])


def test_parameter_counts_of_roberta_large() -> None:
    """Rank 8 on query and value, FedSVD paper, table 6: 786,432 for both factors and 393,216 for B."""
    schema = _roberta_large()
    state = FedAvg().init(schema, schema.zeros(), 0)

    assert schema.size == 786_432
    assert schema.select(FedAvg().plan(state, 0, "ada").train).size == 786_432
    assert schema.select(FFA().plan(state, 0, "ada").train).size == 393_216
    assert schema.select(FedSVD().plan(state, 0, "ada").train).size == 393_216


def test_strategies_load_without_a_tensor_library() -> None:
    code = (
        "import sys\n"
        "from fedloom.core.registry import build\n"
        "for name in ('fedavg', 'ffa', 'fedsvd', 'fedpeft'): build('strategies', name, {})\n"
        "import fedloom.strategies.start, fedloom.strategies.state\n"
        "print(sorted({'torch', 'grpc', 'peft', 'transformers'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
