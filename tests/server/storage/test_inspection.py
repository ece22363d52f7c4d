"""The newest adapter of a state directory, read while a coordinator works on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError, StoreError
from fedloom.server.storage import verify as inspection
from fedloom.server.storage.local import Store
from fedloom.server.storage.verify import Snapshot, newest_state
from fedloom.strategies.state import state_from_bytes


@pytest.fixture
def federation(store: Store, federate: Callable[..., Any], configure: Callable[..., RunConfig]) -> Any:
    """Three rounds, of which one is done."""
    made = federate(store, configure(3))
    made.begin("ann", "ben")
    one_round(made)
    return made


def one_round(federation: Any) -> None:
    for client in ("ann", "ben"):
        federation.send(*federation.update(client))


def test_it_is_the_newest_and_the_coordinator_goes_on(federation: Any, store: Store) -> None:
    for done in (1, 2):
        content = newest_state(store.folder, federation.config)

        reached, ours = state_from_bytes(content, federation.coordinator.state.schema), federation.coordinator.state
        assert (reached.round, ours.round) == (done, done)
        assert all(np.array_equal(reached.adapter[name], ours.adapter[name]) for name in ours.adapter)
        one_round(federation)


def test_a_state_that_is_swept_between_two_looks_is_looked_for_again(
    federation: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, looks = inspection.look, list[Snapshot]()

    def late(folder: Path) -> Snapshot:
        looks.append(look(folder))
        if len(looks) == 1:
            one_round(federation)
        return looks[-1]

    monkeypatch.setattr(inspection, "look", late)
    content = newest_state(store.folder, federation.config)

    assert len(looks) == 2
    assert state_from_bytes(content, federation.coordinator.state.schema).round == 2


def test_what_cannot_be_read_is_named(
    federation: Any, store: Store, configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="of another run file or base model; give the run file and the overrides"):
        newest_state(store.folder, configure(4))
    with Store(tmp_path / "empty", durable=False), pytest.raises(StoreError, match="no run has begun in"):
        newest_state(tmp_path / "empty", federation.config)
    blob = store.folder / "blobs" / inspection.look(store.folder).rounds.state
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(StoreError, match="does not have the bytes its name promises"):
        newest_state(store.folder, federation.config)
    blob.unlink()
    with pytest.raises(StoreError, match=f"{blob.name} is missing"):
        newest_state(store.folder, federation.config)
