"""The ServerApp: our coordinator, strategy and log, with Flower's SuperLink between it and the sites."""

import logging
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

from flwr.app import Context, Message
from flwr.common.config import get_project_dir
from flwr.serverapp import Grid, ServerApp

from fedloom.core.errors import ProtocolError
from fedloom.flower.launch import launch
from fedloom.flower.records import packed, unpacked
from fedloom.flower.rounds import Answered

__all__ = ["app", "main"]


class _GridNodes:
    """Flower's grid as nodes to be asked."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def online(self) -> Collection[int]:
        """Nodes that the SuperLink has heard of lately."""
        return set(self._grid.get_node_ids())

    def ask(self, node: int, head: bytes, payload: bytes, *, work: bool) -> str:
        """Push one message."""
        message = Message(packed(head, payload), node, "train" if work else "query")
        (name,) = self._grid.push_messages([message])
        return str(name)

    def answers(self, messages: Collection[str]) -> Iterable[Answered]:
        """Pull what has come."""
        if not messages:
            return
        for reply in self._grid.pull_messages(messages):
            name = reply.metadata.reply_to_message_id
            if reply.has_error():
                yield Answered(name, b"", b"", f"Flower says: {reply.error.reason} (code {reply.error.code})")
                continue
            try:
                yield Answered(name, *unpacked(reply.content))
            except ProtocolError as error:
                yield Answered(name, b"", b"", str(error))


def main(grid: Grid, context: Context) -> None:
    """Run the app's run file to its end."""
    _speak()
    folder = get_project_dir(grid.run.fab_id, grid.run.fab_version, grid.run.fab_hash)
    state = launch(folder / "run.toml", Path(str(context.run_config["out"])), _GridNodes(grid)).resolve()
    logging.getLogger(__name__).info(
        "run over; `fedloom export run.toml --state %s` writes the adapter where torch is", state
    )


def _speak() -> None:
    """Log to the stream that `flwr run --stream` shows; what Flower's own libraries say is Flower's to choose."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ours = logging.getLogger("fedloom")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.addHandler(handler)


app = ServerApp()
app.main()(main)
