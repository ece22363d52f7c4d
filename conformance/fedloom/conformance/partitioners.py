"""What every partitioner must do.

::

    from fedloom.conformance.partitioners import PartitionerConformance

    class TestMine(PartitionerConformance):
        def partitioner(self):
            return Mine()
"""

import numpy as np
import pytest

from fedloom.client.data.partitioners.api import Partitioner
from fedloom.client.data.rows import Indices, Rows
from fedloom.core.errors import ConfigError

__all__ = ["PartitionerConformance"]

CLIENTS = (1, 2, 5, 12)


class PartitionerConformance:
    """The battery. Define `partitioner`; define `rows` only for one that needs other columns."""

    def partitioner(self) -> Partitioner:
        """A fresh instance of the partitioner under test."""
        raise NotImplementedError("define partitioner() in the subclass and return the partitioner under test")

    def rows(self, count: int = 240) -> Rows:
        """Rows of three labels in four groups."""
        draw = np.random.Generator(np.random.Philox(29))
        labels = draw.integers(0, 3, count)
        groups = tuple(f"site-{each}" for each in draw.integers(0, 4, count))
        return Rows(tuple(f"row {i}" for i in range(count)), labels, groups, ("a", "b", "c"))

    def split(self, rows: Rows, clients: int, seed: int = 0) -> list[Indices]:
        """Each client's positions in ascending order; the test is skipped where the partitioner refuses."""
        try:
            parts = self.partitioner().split(rows, clients, np.random.Generator(np.random.Philox(key=[seed, 31])))
        except ConfigError as error:
            pytest.skip(f"it refuses {len(rows)} rows for {clients} clients: {error}")
        return [np.sort(part) for part in parts]

    @pytest.mark.parametrize("clients", CLIENTS)
    def test_every_row_goes_to_exactly_one_client_and_none_is_empty(self, clients: int) -> None:
        """Nothing is lost, nothing is shared, and no client is left out in silence."""
        parts = self.split(self.rows(), clients)

        assert len(parts) == clients
        assert all(len(part) for part in parts)
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(self.rows())))

    @pytest.mark.parametrize("clients", CLIENTS)
    def test_the_seed_alone_decides(self, clients: int) -> None:
        """Another instance, in another process, splits alike."""
        for ours, theirs in zip(*(self.split(self.rows(), clients, 7) for _ in range(2)), strict=True):
            np.testing.assert_array_equal(ours, theirs)

    def test_all_randomness_comes_from_the_generator(self) -> None:
        """The global state is neither used nor moved."""
        np.random.seed(3)
        before = np.random.get_state(legacy=False)
        parts = self.split(self.rows(), 3)
        after = np.random.get_state(legacy=False)
        np.random.seed(4)

        np.testing.assert_equal(after, before)
        for ours, theirs in zip(parts, self.split(self.rows(), 3), strict=True):
            np.testing.assert_array_equal(ours, theirs)

    def test_the_rows_are_left_alone(self) -> None:
        """They are other clients' too."""
        rows = self.rows()
        rows.labels.flags.writeable = False
        labels = rows.labels.copy()

        self.split(rows, 3)

        np.testing.assert_array_equal(rows.labels, labels)

    def test_a_client_for_each_row_gets_one_each(self) -> None:
        """The tightest split there is, or a refusal."""
        assert [len(part) for part in self.split(self.rows(12), 12)] == [1] * 12
