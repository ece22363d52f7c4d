"""A state directory that the first format wrote opens, and its run goes on.

`tests/golden/state` was made by `make` below with the build that had this format: one round of two clients committed,
the second open with Ann's update in it. It is never made again; a build that cannot read it says so in its changelog
and replaces it.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedloom.core.errors import ConfigError, ProtocolError
from fedloom.server.rounds.state import UpdateAccepted
from fedloom.server.storage.local import Store
from fedloom.server.storage.verify import newest_state

GOLDEN = Path(__file__).parents[2] / "golden" / "state"


def make(federate: Any, folder: Path) -> None:
    """What the golden directory holds."""
    with Store(folder) as store:
        federation = federate(store)
        federation.begin("ann", "ben")
        for client in ("ann", "ben", "ann"):
            federation.send(*federation.update(client))


def finish(federate: Any, folder: Path) -> dict[str, list[float]]:
    """Take the run up and bring it to its end."""
    with Store(folder) as store:
        federation = federate(store)
        federation.begin("ann", "ben")
        assert federation.coordinator.progress.submitted == ("ann",)
        federation.send(*federation.update("ben"))
        assert federation.coordinator.finished
        adapter: dict[str, list[float]] = federation.adapter()
        return adapter


def test_an_old_state_directory_goes_on_to_the_same_adapter(federate: Any, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(GOLDEN, old)
    make(federate, new)

    assert finish(federate, old) == finish(federate, new)


def test_the_old_log_is_what_this_build_reads(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "state")

    with Store(tmp_path / "state") as store:
        events = store.events()

    assert [type(event).__name__ for event in events] == [
        "RunCreated",
        *("RoundOpened", "UpdateAccepted", "UpdateAccepted", "RoundClosed", "AdapterCommitted"),
        *("RoundOpened", "UpdateAccepted"),
    ]
    assert [(each.round, each.client) for each in events if isinstance(each, UpdateAccepted)] == [
        (0, "ann"),
        (0, "ben"),
        (1, "ann"),
    ]


def test_a_run_that_leaves_its_targets_open_is_known_by_the_run_file_of_before(configure: Any, tmp_path: Path) -> None:
    """To the build that wrote it they were query and value."""
    shutil.copytree(GOLDEN, tmp_path / "state")
    with Store(tmp_path / "state"):
        pass  # takes it over

    assert newest_state(tmp_path / "state", configure())
    with pytest.raises(ConfigError, match="another run file or base model"):
        newest_state(tmp_path / "state", configure(adapter={"targets": ["query"]}))


@pytest.mark.parametrize("version", [0, 2])
def test_another_major_version_is_refused_in_plain_words(federate: Any, store: Store, version: int) -> None:
    with pytest.raises(
        ProtocolError,
        match=f"'ann' speaks protocol {version}, this coordinator 1; install the same version of fedloom on both sides",
    ):
        federate(store).coordinator.join("ann", version, 0)
