"""What every data source must do.

::

    from fedloom.conformance.data import DataConformance

    class TestMine(DataConformance):
        def source(self):
            return Mine()
"""

from itertools import islice
from typing import get_args

from fedloom.client.data.packaged.api import DataSource, Split
from fedloom.client.data.records import Record
from fedloom.core.registry import entries

__all__ = ["DataConformance"]

MOST = 100_000
"""Rows of a split that are looked at."""


class DataConformance:
    """The battery. Define `source`."""

    def source(self) -> DataSource:
        """A fresh instance of the data source under test."""
        raise NotImplementedError("define source() in the subclass and return the data source under test")

    def rows(self, split: Split) -> list[Record]:
        """The rows of one split."""
        return list(islice(self.source().records(split), MOST))

    def test_its_task_is_known(self) -> None:
        """One that rows can be read for."""
        assert self.source().task in entries("tasks")

    def test_each_split_has_rows_that_hold_something(self) -> None:
        """A text, a picture, a recording or words, and a place for error messages."""
        for split in get_args(Split):
            rows = self.rows(split)
            assert rows
            assert all(row.where and (row.text or row.image or row.audio or row.words or row.turns) for row in rows)

    def test_the_rows_are_the_same_each_time(self) -> None:
        """In the same order: partitions count on it."""
        for split in get_args(Split):
            assert self.rows(split) == self.rows(split)

    def test_no_row_is_on_both_sides(self) -> None:
        """A model would look better on what it has seen."""
        sides = [{(row.text, row.image, row.audio, row.words) for row in self.rows(split)} for split in get_args(Split)]

        assert not set.intersection(*sides)
