"""The Flower app: a ServerApp with FedAvg, and a ClientApp whose process keeps the model it has loaded.

Both find the work in the folder that PEERS_FOLDER names.
"""

import os
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peers.work import Clock, LoraModel, Work, changed, empty_arrays, load_work, save_final
from safetensors.numpy import load_file

client = ClientApp()
server = ServerApp()


def the_work() -> Work:
    """What is to be done."""
    return load_work(os.environ["PEERS_FOLDER"])


@lru_cache(maxsize=1)
def resident(work: Work) -> LoraModel:
    """The model, loaded once in a process."""
    return LoraModel(work, max(1, work.cores // min(work.cores, work.clients)))


def record(values: dict[str, Any]) -> ArrayRecord:
    """Arrays as Flower sends them."""
    return ArrayRecord({name: Array(value) for name, value in values.items()})


@client.train()  # type: ignore[untyped-decorator]  # flwr has no types here
def train(message: Message, context: Context) -> Message:
    """A client's round."""
    work, number = the_work(), int(context.node_config["partition-id"])
    values = {name: array.numpy() for name, array in message.content["arrays"].items()}
    if work.kind == "lora":
        lora = resident(work)
        lora.show(values)
        lora.train(lora.batch(number))
        values = lora.read()
    else:
        values = {name: changed(value, number) for name, value in values.items()}
    metrics = MetricRecord({"num-examples": 1})  # all count the same
    return Message(RecordDict({"arrays": record(values), "metrics": metrics}), reply_to=message)


class Timed(FedAvg):  # type: ignore[misc]
    """FedAvg that notes when a round's average is there."""

    def __init__(self, work: Work) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=work.clients, min_available_nodes=work.clients)
        self._clock = Clock(work)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """As FedAvg does."""
        answers = list(replies)
        failed = [str(each.error) for each in answers if each.has_error()]
        assert len(answers) == self.min_train_nodes, f"{len(answers)} of {self.min_train_nodes} clients answered"
        assert not failed, f"{len(failed)} clients failed, the first: {failed[0]}"
        averages = super().aggregate_train(server_round, answers)
        self._clock.committed()
        return averages


@server.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    work = the_work()
    start = empty_arrays() if work.kind == "empty" else load_file(work.path / "start.safetensors")
    result = Timed(work).start(grid=grid, initial_arrays=record(start), num_rounds=work.rounds)
    save_final(work, {name: np.asarray(array.numpy()) for name, array in result.arrays.items()})
