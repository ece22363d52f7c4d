"""A cohort that does not fit in memory is folded from the disk, with the same result."""

from pathlib import Path
from typing import Any

import pytest

from fedloom.server.rounds import aggregation
from fedloom.server.rounds.aggregation import Aggregation
from fedloom.server.storage.local import Store
from fedloom.strategies.api import Update

CLIENTS = tuple(f"c{number}" for number in range(6))


def test_updates_beyond_the_bound_are_read_back_and_give_the_same_adapter(
    federate: Any, configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, reread = [], []
    read = Aggregation._reread

    def counted(self: Aggregation, client: str, *more: Any) -> Update:
        reread.append(client)
        return read(self, client, *more)

    monkeypatch.setattr(Aggregation, "_reread", counted)
    for name, bound in (("all", 1 << 20), ("two", 2 * 4 * 26), ("none", 0)):
        monkeypatch.setattr(aggregation, "_FRESH_BYTES", bound)
        reread.clear()
        with Store(tmp_path / name, durable=False) as store:
            federation = federate(store, configure(1), expect=len(CLIENTS))
            federation.begin(*CLIENTS)
            for client in CLIENTS:
                federation.send(*federation.update(client))
            results.append((federation.adapter(), len(reread)))

    assert [count for _, count in results] == [0, 4, 6]
    assert results[0][0] == results[1][0] == results[2][0]


def test_the_bound_is_32_mib() -> None:
    assert aggregation._FRESH_BYTES == 32 << 20
