"""Records as TensorBoard event files."""

import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from fedloom.server.monitoring.recorders.api import RoundRecord, figures

__all__ = ["TensorBoard"]


class TensorBoard:
    """One event file in `folder`: a scalar for each figure, at the round it belongs to."""

    def __init__(self, folder: Path) -> None:
        self._writer = EventFileWriter(str(folder))

    def record(self, record: RoundRecord) -> None:
        """Write the figures of one round."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures(record).items()]
        event = Event(wall_time=time.time(), step=record.round, summary=Summary(value=values))
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
