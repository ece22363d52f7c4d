"""The tree against dense matrices: every node, every prefix and every participation pattern written out."""

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, SingleEpochTreeAggregationDpEvent
from dp_accounting.rdp import RdpAccountant

from fedloom.strategies.api import Update
from fedloom.strategies.transforms.tree_noise import retired, sensitivity
from tests.strategies.transforms.test_user_level import WIDE, round_of, wrapped

Matrix = npt.NDArray[np.float64]


def factors(rounds: int) -> tuple[Matrix, Matrix]:
    """B (prefixes from nodes) and C (nodes from rounds) with B @ C the matrix of prefix sums.

    Made from the definition: the nodes of a prefix are the dyadic intervals of its binary digits.
    """
    nodes: dict[tuple[int, int], int] = {}
    prefixes = []
    for end in range(1, rounds + 1):
        used, start = [], 0
        for level in reversed(range(end.bit_length())):
            if end >> level & 1:
                used.append(nodes.setdefault((start, start + 2**level), len(nodes)))
                start += 2**level
        prefixes.append(used)
    b, c = np.zeros((rounds, len(nodes))), np.zeros((len(nodes), rounds))
    for row, used in enumerate(prefixes):
        b[row, used] = 1
    for (start, end), row in nodes.items():
        c[row, start:end] = 1
    return b, c


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 7, 8, 13, 16])
def test_the_factors_of_this_test_multiply_to_prefix_sums(rounds: int) -> None:
    b, c = factors(rounds)

    np.testing.assert_array_equal(b @ c, np.tril(np.ones((rounds, rounds))))


@pytest.mark.parametrize("rounds", [1, 2, 3, 5, 8, 11, 13])
def test_sensitivity_is_the_worst_of_all_participation_patterns(rounds: int) -> None:
    _, c = factors(rounds)
    for participations in range(rounds + 1):
        patterns = itertools.combinations(range(rounds), participations)
        worst = max(math.sqrt((c[:, list(pattern)].sum(1) ** 2).sum()) for pattern in patterns)

        assert sensitivity(rounds, participations) == pytest.approx(worst, rel=1e-12)


def test_contributions_that_point_in_different_directions_move_the_nodes_less() -> None:
    _, c = factors(13)
    rng = np.random.default_rng(0)
    for _ in range(300):
        taken = rng.choice(13, 5, replace=False)
        moves = np.zeros((13, 3))
        directions = rng.normal(size=(5, 3))
        moves[taken] = directions / np.linalg.norm(directions, axis=1, keepdims=True)

        assert np.linalg.norm(c @ moves) <= sensitivity(13, 5) + 1e-12


@pytest.mark.parametrize("rounds", [1, 6, 64, 100, 1000])
def test_all_rounds_are_the_column_sums_of_the_matrix(rounds: int) -> None:
    _, c = factors(rounds)

    assert sensitivity(rounds, rounds) == pytest.approx(np.linalg.norm(c.sum(1)), rel=1e-12)
    assert sensitivity(rounds, 10**6) == sensitivity(rounds, rounds)


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 100, 127, 128, 1000])
def test_one_participation_costs_what_dp_accounting_says_of_a_tree(rounds: int) -> None:
    """Its REPLACE_SPECIAL is our adjacency: a record against one that contributes nothing."""
    expected, actual = (
        RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL).compose(event).get_epsilon(1e-6)
        for event in (
            SingleEpochTreeAggregationDpEvent(3.0, rounds),
            GaussianDpEvent(3.0 / sensitivity(rounds, 1)),
        )
    )

    assert actual == pytest.approx(expected, rel=1e-12)


def test_sensitivity_grows_with_rounds_and_participations() -> None:
    grid = np.array([[sensitivity(rounds, taken) for taken in range(12)] for rounds in range(40)])

    assert (np.diff(grid, axis=0) >= 0).all()
    assert (np.diff(grid, axis=1) >= 0).all()


def test_a_released_sum_carries_one_noise_for_each_binary_digit_of_its_round() -> None:
    """Variance popcount(t) (z S / m)^2 after round t, on 150,000 values: five standard errors are 1.8 %."""
    strategy = wrapped(mechanism="tree", noise_multiplier=1.5, clip_norm=0.5, cohort=4)
    state = strategy.init(WIDE, WIDE.zeros(), 0)
    for round in range(1, 17):
        state = round_of(strategy, state, [Update("ada", 1.0, WIDE.zeros(), WIDE.zeros())])

        variance = float(np.var(state.adapter["b"], dtype=np.float64))
        assert variance == pytest.approx(round.bit_count() * (1.5 * 0.5 / 4) ** 2, rel=0.018)


def test_live_nodes_are_the_digits_of_the_rounds_that_have_ended() -> None:
    live = 0
    for round in range(200):
        live += 1 - retired(round)

        assert live == (round + 1).bit_count()
