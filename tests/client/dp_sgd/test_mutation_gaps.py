"""Properties that no other test pins down; each kills a mutation of tests/mutations."""

from pathlib import Path

import numpy as np
import pytest

from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.dp_sgd.rng import Seeded, System, poisson
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec
from fedloom.proto.messages import Assignment


@pytest.mark.parametrize("entropy", [Seeded(1), System()], ids=["seeded", "system"])
def test_a_sample_is_poisson(entropy: Seeded | System) -> None:
    count, rate, draws = 50, 0.1, 4000

    member = np.zeros((draws, count))
    for row in member:
        row[poisson(entropy, count, rate)] = 1

    # Five standard errors each: of a mean, of a variance (about var * sqrt(2 / draws)), of a correlation.
    assert abs(member.mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / member.size)
    assert np.abs(member.mean(0) - rate).max() < 5 * np.sqrt(rate * (1 - rate) / draws)
    spread = count * rate * (1 - rate)
    assert abs(member.sum(1).var() - spread) < 5 * spread * np.sqrt(2 / draws)
    between = np.corrcoef(member[:, :20].T)
    assert np.abs(between - np.eye(20)).max() < 5 / np.sqrt(draws)


def test_a_sample_of_nobody_and_of_everybody() -> None:
    assert poisson(System(), 0, 0.5).shape == (0,)
    assert poisson(System(), 5, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_two_private_rounds_of_one_seed_differ(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, tmp_path: Path
) -> None:
    start = tiny_model.read(tiny_model.schema)
    order = Assignment(0, tiny_model.schema.roles, tiny_model.schema.roles, broadcast_digest="", broadcast_bytes=0)

    with Ledger(tmp_path, "sha256:" + "0" * 64) as ledger:
        first, second = (
            Trainer(tiny_model, rows, spec, policy, ledger).train("run", order, start).delta for _ in range(2)
        )

    for name, value in first.items():
        assert not np.array_equal(value, second[name]), name
