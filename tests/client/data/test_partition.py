import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.client.data.partitioners.api import Partitioner, partition
from fedloom.client.data.rows import Indices, Rows
from fedloom.core.errors import ConfigError
from fedloom.core.registry import build, entries, options_model

SCHEMES = [name for name, entry in entries("partitioners").items() if entry.ours]
GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "partitions.json").read_text())

Case = tuple[Rows, int, str, float, int]


def split(rows: Rows, clients: int, scheme: str, alpha: float, seed: int, **more: Any) -> list[Indices]:
    """The parts under a partitioner of that name, which takes `alpha` if it has such an option."""
    if "dirichlet_alpha" in options_model("partitioners", scheme).model_fields:
        more["dirichlet_alpha"] = alpha
    by: Partitioner = build("partitioners", scheme, more)
    return partition(rows, clients, by, seed)


def rows_of(labels: list[int], groups: list[str] | None = None) -> Rows:
    names = tuple(str(label) for label in range(max(labels, default=0) + 1))
    return Rows(tuple("t" for _ in labels), np.array(labels, np.int64), tuple(groups or ["" for _ in labels]), names)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    labels = draw(st.lists(st.integers(0, 4), min_size=1, max_size=80))
    scheme = draw(st.sampled_from(SCHEMES))
    fewest = 1
    if scheme == "pathological":  # two labels for each client: there are two, and the clients can hold them all
        labels += [0, 1]
        fewest = (len(set(labels)) + 1) // 2
    groups = [draw(st.sampled_from(["a", "b", "c", "d"])) for _ in labels]
    alpha = draw(st.sampled_from([1e-12, 1e-3, 0.5, 10.0, 1e6]))
    clients = draw(st.integers(min(fewest, len(labels)), len(labels)))
    return rows_of(labels, groups), clients, scheme, alpha, draw(st.integers(0, 2**63 - 1))


@given(cases())
def test_every_row_goes_to_exactly_one_client_and_no_client_is_empty(
    case: Case,
) -> None:
    rows, clients, *_ = case

    parts = split(*case)

    assert len(parts) == clients
    assert all(len(part) and part.dtype == np.int64 for part in parts)
    assert all(np.all(np.diff(part) > 0) for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(rows)))


@given(cases())
def test_the_seed_alone_decides_the_partition(case: Case) -> None:
    for first, second in zip(split(*case), split(*case), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_seed_gives_another_partition(scheme: str) -> None:
    rows = rows_of([i % 3 for i in range(120)], ["x"] * 120)

    first, second = split(rows, 4, scheme, 0.5, 0), split(rows, 4, scheme, 0.5, 1)

    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_iid_shares_are_equal() -> None:
    sizes = sorted(len(part) for part in split(rows_of([0, 1] * 25), 4, "iid", 0.5, 7))

    assert sizes == [12, 12, 13, 13]


def test_small_alpha_is_more_skewed_than_large_alpha() -> None:
    rows = rows_of([i % 4 for i in range(4000)])

    def largest_label_share(alpha: float) -> float:
        parts = split(rows, 8, "dirichlet", alpha, 3)
        return float(np.mean([np.bincount(rows.labels[part]).max() / len(part) for part in parts]))

    assert largest_label_share(0.05) > 0.7
    assert largest_label_share(1e6) < 0.27


def test_group_clients_never_mix_groups_and_follow_their_sizes() -> None:
    groups = ["big"] * 600 + ["middle"] * 300 + ["small"] * 5
    rows = rows_of([i % 2 for i in range(905)], groups)

    parts = split(rows, 7, "group", 1.0, 0)

    owners = [{rows.groups[i] for i in part} for part in parts]
    assert all(len(owner) == 1 for owner in owners)
    assert [owners.count({name}) for name in ("big", "middle", "small")] == [4, 2, 1]


def test_fewer_clients_than_groups_merges_whole_groups_evenly() -> None:
    groups = ["a"] * 50 + ["b"] * 30 + ["c"] * 20 + ["d"] * 5
    rows = rows_of([i % 2 for i in range(105)], groups)

    parts = split(rows, 2, "group", 0.5, 0)

    owners = sorted(sorted({rows.groups[i] for i in part}) for part in parts)
    assert owners == [["a", "d"], ["b", "c"]]


def test_groups_get_no_more_clients_than_rows() -> None:
    rows = rows_of([0] * 12, ["a"] * 10 + ["b"] * 2)

    parts = split(rows, 12, "group", 0.1, 0)

    assert sorted(int(part[0]) for part in parts) == list(range(12))


@pytest.mark.parametrize("clients", [0, 4])
def test_a_client_count_that_cannot_be_served_is_refused(clients: int) -> None:
    with pytest.raises(ConfigError, match=f"clients = {clients} with 3 rows; 1 to 3"):
        split(rows_of([0, 1, 0]), clients, "iid", 0.5, 0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf"), 1e308])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="dirichlet_alpha"):
        split(rows_of([0, 1, 0]), 2, "dirichlet", alpha, 0)


def test_group_without_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match="no row has a group"):
        split(rows_of([0, 1, 0]), 2, "group", 0.5, 0)


@pytest.mark.parametrize(
    ("labels", "clients", "classes"), [(10, 5, 2), (10, 20, 2), (10, 7, 3), (4, 3, 4), (10, 10, 1)]
)
def test_pathological_clients_have_exactly_so_many_labels(labels: int, clients: int, classes: int) -> None:
    rows = rows_of([i % labels for i in range(50 * labels)])

    parts = split(rows, clients, "pathological", 0.5, 3, classes_per_client=classes)

    owned = [set(rows.labels[part].tolist()) for part in parts]
    assert [len(each) for each in owned] == [classes] * clients
    owners = [sum(label in each for each in owned) for label in range(labels)]
    assert min(owners) >= 1
    assert max(owners) - min(owners) <= 1
    for label in range(labels):
        counts = [int((rows.labels[part] == label).sum()) for part in parts if label in rows.labels[part]]
        assert max(counts) - min(counts) <= 1


def test_pathological_that_cannot_be_is_refused() -> None:
    rows = rows_of([0, 1, 2, 3] * 5)

    with pytest.raises(ConfigError, match="the data have 4 labels, so 1 to that many"):
        split(rows, 2, "pathological", 0.5, 0, classes_per_client=5)
    with pytest.raises(ConfigError, match=r"1 clients with data\.classes_per_client = 2 cannot hold 4 labels"):
        split(rows, 1, "pathological", 0.5, 0)
    texts = Rows(("a", "b"), np.zeros(2, np.int64), ("", ""), (), "causal-lm", prompts=("", ""))
    with pytest.raises(ConfigError, match="causal-lm has none"):
        split(texts, 2, "pathological", 0.5, 0)


@pytest.mark.parametrize(
    ("count", "clients", "more", "expected"),
    [
        (110, 3, {}, [60, 30, 20]),
        (100, 4, {"size_exponent": 0.0}, [25, 25, 25, 25]),
        (100, 3, {"shares": (1, 1, 8)}, [10, 10, 80]),
        (10, 3, {"shares": (1e-300, 1, 1e300)}, [1, 1, 8]),
        (4, 4, {"size_exponent": 10.0}, [1, 1, 1, 1]),
        (7, 2, {"shares": (1.7e308, 1.7e308)}, [4, 3]),
    ],
)
def test_sizes_follow_the_power_law_or_the_given_shares(
    count: int, clients: int, more: dict[str, Any], expected: list[int]
) -> None:
    parts = split(rows_of([i % 2 for i in range(count)]), clients, "size", 0.5, 1, **more)

    assert [len(part) for part in parts] == expected


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=40), st.integers(0, 200))
def test_sizes_are_within_a_row_of_their_shares_and_add_up(shares: list[float], extra: int) -> None:
    count = len(shares) + extra

    sizes = [len(part) for part in split(rows_of([0] * count), len(shares), "size", 0.5, 0, shares=shares)]

    assert sum(sizes) == count
    assert min(sizes) >= 1
    total = sum(share for share, size in zip(shares, sizes, strict=True) if size > 1)
    left = sum(size for size in sizes if size > 1)
    for share, size in zip(shares, sizes, strict=True):
        assert size == 1 or abs(size - left * share / total) < len(shares)


@pytest.mark.parametrize("shares", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_shares_that_say_nothing_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"shares.*(above 0|greater than 0|finite number)"):
        split(rows_of([0, 1, 0]), 2, "size", 0.5, 0, shares=shares)


@pytest.mark.parametrize("exponent", [-1.0, 11.0, float("nan")])
def test_an_exponent_out_of_range_is_refused(exponent: float) -> None:
    with pytest.raises(
        ConfigError, match=r"size_exponent.*(greater than or equal to 0|less than or equal to 10|finite number)"
    ):
        split(rows_of([0, 1, 0]), 2, "size", 0.5, 0, size_exponent=exponent)


@pytest.mark.parametrize("case", sorted(GOLDEN))
def test_partitions_are_those_of_0_1(case: str) -> None:
    """Digests written down by the function that 0.1 had for all five."""
    scheme, options, clients, seed = json.loads(case)
    draw = np.random.Generator(np.random.Philox(5))
    labels, groups = draw.integers(0, 6, 211), [f"g{i}" for i in draw.integers(0, 5, 211)]
    rows = Rows(tuple(map(str, range(211))), labels, tuple(groups), tuple("abcdef"))

    parts = partition(rows, clients, build("partitioners", scheme, options), seed)

    told = b"".join(np.int64(len(part)).tobytes() + part.astype("<i8").tobytes() for part in parts)
    assert hashlib.sha256(told).hexdigest()[:16] == GOLDEN[case]


class Wrong:
    """Leaves out what it is told."""

    def __init__(self, *parts: list[int]) -> None:
        self.parts = parts

    def split(self, rows: Rows, clients: int, draw: np.random.Generator) -> list[Indices]:
        return [np.array(part, np.int64) for part in self.parts]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (([0, 1, 2], []), "partitioner Wrong gives rows to 1 of 2 clients; each needs at least one"),
        (([0, 1, 2],), "gives rows to 1 of 2 clients"),
        (([0], [1]), "does not give each of 3 rows to exactly one client"),
        (([0, 1], [1, 2]), "does not give each of 3 rows to exactly one client"),
        (([0, 1], [3]), "does not give each of 3 rows to exactly one client"),
    ],
)
def test_a_partitioner_that_loses_rows_or_clients_is_refused(parts: tuple[list[int], ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        partition(rows_of([0, 1, 0]), 2, Wrong(*parts), 0)


def test_rows_with_several_labels_are_split_by_their_sets_and_each_goes_to_one_client() -> None:
    sets = np.array([[0, 0], [1, 0], [1, 1]] * 30)
    rows = Rows(tuple(map(str, range(90))), sets, ("",) * 90, ("a", "b"), "multi-label")
    assert len(np.unique(rows.kinds)) == 3
    for scheme, options in (("dirichlet", {"dirichlet_alpha": 0.1}), ("pathological", {"classes_per_client": 1})):
        by: Partitioner = build("partitioners", scheme, options)
        parts = by.split(rows, 3, np.random.default_rng(0))
        assert sorted(np.concatenate(parts).tolist()) == list(range(90))
    assert [len(np.unique(rows.kinds[part])) for part in parts] == [1, 1, 1]
