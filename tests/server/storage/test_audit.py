import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.core.errors import ConfigError, ProtocolError, StoreError, UpdateRejected
from fedloom.server.storage.audit_log import Audit, AuditRecord, record_from_json, record_to_json
from fedloom.server.storage.local import Store


def told(store: Store) -> list[tuple[str, str]]:
    return [(record.kind, record.client) for record in store.audit()]


def test_who_joined_was_refused_and_was_rejected_is_on_record(federate: Any, store: Store) -> None:
    federation = federate(store)
    federation.begin("ann", "ben")
    federation.join("ann")
    with pytest.raises(ProtocolError):
        federation.join("two words")
    with pytest.raises(ConfigError):
        federation.join("cat", examples=10**13)
    federation.send(*federation.update("ann", 1.0))
    with pytest.raises(UpdateRejected):
        federation.send(*federation.update("ben", np.nan))
    federation.coordinator.tick()
    federation.coordinator.close()

    assert told(store) == [
        ("started", ""),
        ("joined", "ann"),
        ("joined", "ben"),
        ("refused", "two words"),
        ("refused", "cat"),
        ("rejected", "ben"),
        ("stopped", ""),
    ]
    assert "NaN" in store.audit()[5].detail
    assert {record.epoch for record in store.audit()} == {1}


def test_a_second_different_update_is_on_record(federate: Any, store: Store) -> None:
    federation = federate(store)
    federation.begin("ann", "ben")
    first, second = federation.update("ann", 1.0), federation.update("ann", 2.0)
    federation.send(*first)
    with pytest.raises(ProtocolError):
        federation.send(*second)
    federation.coordinator.tick()

    assert told(store)[-1] == ("refused", "ann")
    assert "another update" in store.audit()[-1].detail


def test_a_flood_of_refusals_is_counted_and_not_written(tmp_path: Path) -> None:
    now_s = 0.0
    with Store(tmp_path, durable=False) as store:
        audit = Audit(store, lambda: now_s)
        for number in range(5000):
            audit.note("refused", f"c{number}")
        audit.note("joined", "ann")
        audit.write()
        assert len(store.audit()) == 101
        now_s = 60.0
        audit.note("refused", "ben")
        audit.write()
        assert store.audit()[101].detail == "4900 more refusals within a minute"
        assert told(store)[102:] == [("refused", "ben")]
        for number in range(101):
            audit.note("refused", f"c{number}")
        audit.write(ending=True)

    with Store(tmp_path, durable=False) as store:
        assert store.audit()[-1].detail == "2 more refusals within a minute"


def test_a_note_cannot_be_made_long(tmp_path: Path) -> None:
    with Store(tmp_path, durable=False) as store:
        audit = Audit(store)
        audit.note("refused", "a" * 10_000, "b" * 10_000)
        audit.write()

        (record,) = store.audit()
        assert len(record_to_json(record)) < 1000


@pytest.mark.parametrize("spoil", [{"kind": "shrugged"}, {"extra": 1}, {"kind": None}])
def test_a_row_that_is_no_record_is_refused(spoil: dict[str, object]) -> None:
    row = record_to_json(AuditRecord("t", 1, "joined", "ann", ""))
    assert record_from_json(row).client == "ann"

    with pytest.raises(StoreError, match="audit log row"):
        record_from_json(json.dumps({**json.loads(row), **spoil}))
    with pytest.raises(StoreError, match="audit log row"):
        record_from_json(row[:-2])
