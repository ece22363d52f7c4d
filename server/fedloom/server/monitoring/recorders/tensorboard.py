"""Records as TensorBoard event files."""

import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from fedloom.core.config.run import RunConfig
from fedloom.server.monitoring.recorders.api import RoundRecord, figures

__all__ = ["TensorBoard"]


class TensorBoard:
    """An event file in the folder tensorboard of the run: a scalar for each figure, at the round it belongs to."""

    def open(self, folder: Path, config: RunConfig) -> None:
        """Begin another event file; TensorBoard shows all of a folder as one run."""
        self._writer = EventFileWriter(str(folder / "tensorboard"))

    def record(self, record: RoundRecord) -> None:
        """Write the figures of one round."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures(record).items()]
        event = Event(wall_time=time.time(), step=record.round, summary=Summary(value=values))
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
