"""Engines in this process, so that a test can look at the coordinator and give the clients their noise."""

import threading
from functools import partial

import numpy as np

from fedloom.client.data.rows import digest
from fedloom.client.models.load import load_model
from fedloom.client.privacy.dp_sgd.rng import Entropy, Seeded
from fedloom.client.privacy.ledger.account import personal_folder
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.participant import Participant
from fedloom.client.training.trainer import Trainer
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.schema import Tensors
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.server import serving
from fedloom.simulation.federation import Federation

__all__ = ["entropy_of", "largest_difference", "over_sockets"]


def entropy_of(name: str, round: int) -> Entropy:
    return Seeded(99, round, *name.encode())


def over_sockets(federation: Federation, coordinator: Coordinator) -> None:
    """Every client in a thread with a base model of its own, over real gRPC."""
    failures: list[BaseException] = []

    # Loaded here: warnings filters, which the loading sets, belong to the process and not to a thread.
    models = {name: load_model(federation.config.model, federation.config.adapter) for name in federation.clients}

    def life(name: str, address: str) -> None:
        policy, rows, model = federation.policies[name], federation.clients[name], models[name]
        try:
            with Ledger(policy.client.state / "socket-ledger", digest(rows)) as ledger:
                trainer = Trainer(
                    model,
                    rows,
                    federation.config.spec,
                    policy,
                    ledger,
                    personal=personal_folder(policy),
                    entropy_for=partial(entropy_of, name),
                )
                connection = GrpcConnection(address)
                Participant(connection, policy, lambda _: trainer).run(patience_s=20)
                connection.close()
        except BaseException as error:
            failures.append(error)
            raise

    with serving(coordinator) as address:
        threads = [threading.Thread(target=life, args=(name, address)) for name in federation.clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert not failures


def largest_difference(one: Tensors, two: Tensors) -> float:
    assert one.keys() == two.keys()
    return max(float(np.abs(one[name] - two[name]).max()) for name in one)
