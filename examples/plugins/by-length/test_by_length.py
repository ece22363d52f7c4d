"""by-length passes fedloom's battery, and sorts."""

import numpy as np
from fedloom_by_length import ByLength

from fedloom.client.data.rows import Rows
from fedloom.conformance.partitioners import PartitionerConformance
from fedloom.core.registry import build, faults


class TestByLength(PartitionerConformance):
    """What holds for every partitioner."""

    def partitioner(self) -> ByLength:
        """The partitioner under test."""
        return ByLength()


def test_it_is_found_by_name_with_its_option() -> None:
    assert faults("partitioners", "by-length") == []
    assert build("partitioners", "by-length", {"mixed": 0}) == ByLength(mixed=0.0)


def test_unmixed_clients_have_texts_of_their_own_length() -> None:
    lengths = np.random.Generator(np.random.Philox(1)).permutation(90)
    rows = Rows(tuple("x" * n for n in lengths), np.zeros(90, np.int64), ("",) * 90, ("a", "b"))

    parts = ByLength(mixed=0.0).split(rows, 3, np.random.Generator(np.random.Philox(2)))

    assert [sorted(lengths[part].tolist()) for part in parts] == [list(range(30 * k, 30 * k + 30)) for k in range(3)]
