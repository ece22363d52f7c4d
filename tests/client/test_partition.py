import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.client.data.partition import Scheme, partition
from fedloom.client.data.rows import Rows
from fedloom.proto.errors import ConfigError

SCHEMES: tuple[Scheme, ...] = ("iid", "dirichlet", "group")


def rows_of(labels: list[int], groups: list[str] | None = None) -> Rows:
    names = tuple(str(label) for label in range(max(labels, default=0) + 1))
    return Rows(tuple("t" for _ in labels), np.array(labels, np.int64), tuple(groups or ["" for _ in labels]), names)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Rows, int, Scheme, float, int]:
    labels = draw(st.lists(st.integers(0, 4), min_size=1, max_size=80))
    groups = [draw(st.sampled_from(["a", "b", "c", "d"])) for _ in labels]
    alpha = draw(st.sampled_from([1e-12, 1e-3, 0.5, 10.0, 1e6]))
    clients = draw(st.integers(1, len(labels)))
    return rows_of(labels, groups), clients, draw(st.sampled_from(SCHEMES)), alpha, draw(st.integers(0, 2**63 - 1))


@given(cases())
def test_every_row_goes_to_exactly_one_client_and_no_client_is_empty(
    case: tuple[Rows, int, Scheme, float, int],
) -> None:
    rows, clients, *_ = case

    parts = partition(*case)

    assert len(parts) == clients
    assert all(len(part) and part.dtype == np.int64 for part in parts)
    assert all(np.all(np.diff(part) > 0) for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(rows)))


@given(cases())
def test_the_seed_alone_decides_the_partition(case: tuple[Rows, int, Scheme, float, int]) -> None:
    for first, second in zip(partition(*case), partition(*case), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_seed_gives_another_partition(scheme: Scheme) -> None:
    rows = rows_of([i % 3 for i in range(120)], ["x"] * 120)

    first, second = partition(rows, 4, scheme, 0.5, 0), partition(rows, 4, scheme, 0.5, 1)

    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_iid_shares_are_equal() -> None:
    sizes = sorted(len(part) for part in partition(rows_of([0, 1] * 25), 4, "iid", 0.5, 7))

    assert sizes == [12, 12, 13, 13]


def test_small_alpha_is_more_skewed_than_large_alpha() -> None:
    rows = rows_of([i % 4 for i in range(4000)])

    def largest_label_share(alpha: float) -> float:
        parts = partition(rows, 8, "dirichlet", alpha, 3)
        return float(np.mean([np.bincount(rows.labels[part]).max() / len(part) for part in parts]))

    assert largest_label_share(0.05) > 0.7
    assert largest_label_share(1e6) < 0.27


def test_group_clients_never_mix_groups_and_follow_their_sizes() -> None:
    groups = ["big"] * 600 + ["middle"] * 300 + ["small"] * 5
    rows = rows_of([i % 2 for i in range(905)], groups)

    parts = partition(rows, 7, "group", 1.0, 0)

    owners = [{rows.groups[i] for i in part} for part in parts]
    assert all(len(owner) == 1 for owner in owners)
    assert [owners.count({name}) for name in ("big", "middle", "small")] == [4, 2, 1]


def test_fewer_clients_than_groups_merges_whole_groups_evenly() -> None:
    groups = ["a"] * 50 + ["b"] * 30 + ["c"] * 20 + ["d"] * 5
    rows = rows_of([i % 2 for i in range(105)], groups)

    parts = partition(rows, 2, "group", 0.5, 0)

    owners = sorted(sorted({rows.groups[i] for i in part}) for part in parts)
    assert owners == [["a", "d"], ["b", "c"]]


def test_groups_get_no_more_clients_than_rows() -> None:
    rows = rows_of([0] * 12, ["a"] * 10 + ["b"] * 2)

    parts = partition(rows, 12, "group", 0.1, 0)

    assert sorted(int(part[0]) for part in parts) == list(range(12))


@pytest.mark.parametrize("clients", [0, 4])
def test_a_client_count_that_cannot_be_served_is_refused(clients: int) -> None:
    with pytest.raises(ConfigError, match=f"clients = {clients} with 3 rows; 1 to 3"):
        partition(rows_of([0, 1, 0]), clients, "iid", 0.5, 0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf"), 1e308])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="dirichlet_alpha"):
        partition(rows_of([0, 1, 0]), 2, "dirichlet", alpha, 0)


def test_group_without_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match="no row has a group"):
        partition(rows_of([0, 1, 0]), 2, "group", 0.5, 0)
