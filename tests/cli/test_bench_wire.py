"""What goes over the wire, by its three benchmarks."""

import json
from typing import Any

import pytest

from fedloom.core.registry import entries
from tests.support.preloaded import fedloom


def document(*arguments: str) -> dict[str, Any]:
    """What a benchmark says to programs."""
    done = fedloom("bench", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_round_takes_hardly_more_than_its_bits() -> None:
    found = document("wire")

    rows = {(row["strategy"], row["codec"]): row for row in found["rows"]}
    assert rows.keys() == {(strategy, name) for strategy in ("fedavg", "ffa", "fedsvd") for name in entries("codecs")}
    assert found["max_overhead_percent"] <= 3
    # 393,216 values of B at two bits, a scale for each 1,024 of them, and 1 KiB for all that is said about them.
    assert rows["fedsvd", "eden2"]["up"] <= 393_216 / 4 + 4 * 384 + 1024
    assert rows["fedsvd", "eden2"]["down"] <= 393_216 / 4 + 4 * 384 + 1024
    assert rows["fedsvd", "fp32"]["up"] >= 4 * 393_216, "and float32 is what it is"
    for row in rows.values():
        assert row["whole"] == 4 * 786_432


def test_codecs_lose_what_they_say() -> None:
    found = document("codecs", "--parameters", "200000", "--repeats", "1", "--clients", "2")

    assert found["parameters"] == 200_000
    assert {row["codec"] for row in found["rows"]} == set(entries("codecs"))
    for row in found["rows"]:
        assert row["error"] <= 1.05 * row["stated"]
        assert row["encode"] > 0
        assert row["decode"] > 0
        assert row["round"] > 0
        if row["codec"].startswith("eden"):
            assert row["floor"] < row["error"] < 3 * row["floor"]


@pytest.mark.e2e
def test_a_slow_line_is_not_outrun() -> None:
    found = document("throughput", "--mib", "2", "--rounds", "2", "--rtt-ms", "20", "--mbit-s", "50")

    assert found["down_mib_s"] > 0
    assert found["up_mib_s"] > 0
    assert found["down_of_raw"] > 0
    assert found["up_of_raw"] > 0
    assert 190_000 < found["far_bytes"] < 206_000
    # What two round trips and the bandwidth leave: a proxy that let more through would measure nothing.
    assert found["far_ratio"] > 0.9
