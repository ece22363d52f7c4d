"""Nothing is written to a disk that has failed, not even that the coordinator stops."""

from typing import Any

import pytest

from fedloom.core.errors import StoreError
from fedloom.server.storage.local import Store


@pytest.mark.parametrize("failing", ["note", "append"])
def test_a_coordinator_whose_disk_has_failed_writes_no_last_words(
    federate: Any, store: Store, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    federation = federate(store)
    federation.begin("ann", "ben")
    federation.send(*federation.update("ann"))
    federation.now_s = 1000.0  # the leases end, which is an event
    written: list[str] = []
    monkeypatch.setattr(store, "note", lambda *_: written.append("note"))

    def fail(*_: object) -> None:
        written.append("failed")
        raise StoreError("disk gone")

    monkeypatch.setattr(store, failing, fail)
    with pytest.raises(StoreError, match="disk gone"):
        federation.coordinator.tick()
    if failing == "append":
        with pytest.raises(StoreError, match="disk gone"):
            federation.coordinator.close()
    else:
        federation.coordinator.close()

    assert written == ["failed"]
