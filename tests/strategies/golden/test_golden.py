"""Strategies go where they went when these trajectories were recorded, see `trajectories`."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.strategies.golden.trajectories import DIGESTS, FACTORS, Case, cases, digest, trajectory


@pytest.mark.parametrize("case", [each for each in cases() if not each.factored], ids=lambda case: case.name)
def test_sums_are_the_same_bits(case: Case) -> None:
    assert [digest(state) for state in trajectory(case)] == json.loads(DIGESTS.read_text())[case.name]


@pytest.mark.parametrize("case", [each for each in cases() if each.factored], ids=lambda case: case.name)
def test_factors_are_the_same_values(case: Case) -> None:
    recorded = load_file(FACTORS)
    *_, last = trajectory(case)

    for name, tensor in last.adapter.items():
        np.testing.assert_allclose(tensor, recorded[f"{case.name}/{name}"], rtol=0, atol=1e-5)


def test_every_record_has_its_case() -> None:
    assert json.loads(DIGESTS.read_text()).keys() == {case.name for case in cases()}
