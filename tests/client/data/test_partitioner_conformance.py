"""Every installed partitioner passes the battery, and those that lose rows or clients do not."""

import numpy as np
import pytest

from fedloom.client.data.partitioners.api import Partitioner
from fedloom.client.data.rows import Indices, Rows
from fedloom.conformance.partitioners import PartitionerConformance
from fedloom.core.registry import build, entries


class TestInstalled(PartitionerConformance):
    @pytest.fixture(autouse=True, params=list(entries("partitioners")))
    def _name(self, request: pytest.FixtureRequest) -> None:
        self.name: str = request.param

    def partitioner(self) -> Partitioner:
        found: Partitioner = build("partitioners", self.name, {})
        return found


class Hoarder:
    """All rows for the first."""

    def split(self, rows: Rows, clients: int, draw: np.random.Generator) -> list[Indices]:
        return [np.arange(len(rows)), *(np.zeros(0, np.int64) for _ in range(clients - 1))]


class Forgetful:
    """Without the last row."""

    def split(self, rows: Rows, clients: int, draw: np.random.Generator) -> list[Indices]:
        return np.array_split(np.arange(len(rows) - 1), clients)


class Global:
    """From the state that everybody shares."""

    def split(self, rows: Rows, clients: int, draw: np.random.Generator) -> list[Indices]:
        return np.array_split(np.random.permutation(len(rows)), clients)


@pytest.mark.parametrize("wrong", [Hoarder(), Forgetful(), Global()])
def test_the_battery_sees_it(wrong: Partitioner) -> None:
    class Battery(PartitionerConformance):
        def partitioner(self) -> Partitioner:
            return wrong

    def all_laws() -> None:
        Battery().test_every_row_goes_to_exactly_one_client_and_none_is_empty(2)
        Battery().test_all_randomness_comes_from_the_generator()

    with pytest.raises(AssertionError):
        all_laws()
