"""From an exported app's run file to a finished run, over whatever nodes there are."""

import logging
from pathlib import Path

from fedloom.core.config.parsing import read_json
from fedloom.core.config.run import load_run
from fedloom.core.errors import ConfigError, StoreError
from fedloom.flower.rounds import Nodes, coordinate
from fedloom.proto.messages import Joined
from fedloom.server.build import build_strategy, calibrated
from fedloom.server.coordinator import Coordinator
from fedloom.server.prepared_schema import prepared_path, with_prepared
from fedloom.server.rounds.state import RunCreated
from fedloom.server.storage.local import Store
from fedloom.strategies.start import stored_start

__all__ = ["launch"]

log = logging.getLogger(__name__)


def launch(run: Path, out: Path, nodes: Nodes) -> Path:
    """Coordinate a run to its end. Launched again with the same files, it goes on where its log ends.

    Args:
        run: The run file; its RUN.schema.json lies beside it.
        out: Parent of the run's folder.
        nodes: Who can be asked.

    Returns:
        The state folder, from which `fedloom export` writes the adapter.

    Raises:
        ConfigError: The run file is wrong, or asks for what this engine has not.
        StoreError: The state cannot be written, or another coordinator has it.
    """
    config, schema = with_prepared(load_run(run), read_json(prepared_path(run)), run)
    if config.secure_aggregation.enabled:
        raise ConfigError(
            "secure_aggregation.enabled = true needs the gRPC engine, whose clients exchange keys within a round; "
            "leave it out, or use `fedloom server`"
        )
    config = calibrated(config)
    strategy = build_strategy(config)
    folder = out / config.run.name / "state"
    with Store(folder) as store:
        starting = {} if config.start is not None and store.events() else stored_start(config, schema)
        coordinator = Coordinator(config, schema, strategy, store, starting=starting)
        coordinator.on_commit = lambda number, _: log.info("round %d/%d committed", number, config.run.rounds)
        coordinate(coordinator, Joined(_named(store), coordinator.epoch, config.spec, schema), nodes)
    return folder


def _named(store: Store) -> str:
    """The run's name in every message, as its first event has it."""
    for event in store.events():
        if isinstance(event, RunCreated):
            return event.run
    raise StoreError(f"{store.folder} holds no run; give the run another folder")
