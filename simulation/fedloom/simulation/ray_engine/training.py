"""The driver's half of a client's trainer: the checks, the real ledger, what the client keeps. Actors do the steps."""

import threading
from collections import OrderedDict
from dataclasses import replace
from typing import Any

from fedloom.client.privacy.ledger.account import personal_folder
from fedloom.client.session.api import CheckCancelled, Trained
from fedloom.client.training.admission import Account, Admission
from fedloom.client.training.trainer import EntropyFor
from fedloom.core.privacy.spends import evaluation_spend, training_spend
from fedloom.core.schema import Tensors
from fedloom.proto.message_codec import to_json
from fedloom.proto.messages import Assignment, Joined
from fedloom.simulation.federation import Federation
from fedloom.simulation.ray_engine.actor import Answer, ClientData, Order, Receipt
from fedloom.simulation.ray_engine.fleet import Fleet

__all__ = ["ObjectStore", "RemoteTraining"]

_KEPT_ORDERS = 8
"""Distinct orders that are kept for clients to come. Each is as large as an adapter."""


class ObjectStore:
    """What is put into Ray's object store once, however many clients and actors it is for."""

    def __init__(self, ray: Any) -> None:
        self.put = ray.put
        self._orders: OrderedDict[bytes, Any] = OrderedDict()
        self._lock = threading.Lock()

    def order(self, run: str, assignment: Assignment, broadcast: Tensors) -> Any:
        """Reference to the work of an assignment, the same one for all clients that are asked the same."""
        # Where they came from to these tensors makes no difference: the digests say that they are the same.
        key = to_json(replace(assignment, links=()))
        with self._lock:
            if key not in self._orders:
                self._orders[key] = self.put(Order(run, assignment, broadcast))
            self._orders.move_to_end(key)
            if len(self._orders) > _KEPT_ORDERS:
                self._orders.popitem(last=False)
            return self._orders[key]


class RemoteTraining(Admission):
    """One client's trainer, as `Training` says.

    A round is checked and charged here, durably, before anything is sent to an actor. One that dies over it has
    released nothing, and what it was doing is done again for the same charge.

    Args:
        federation: Data and policies.
        joined: The run, already checked against the client's policy.
        name: The client.
        ledger: Its account; a private run needs it.
        fleet: Does the steps.
        store: For what is sent to it.
        entropy_for: Test seam, see `Trainer`.
    """

    def __init__(
        self,
        federation: Federation,
        joined: Joined,
        name: str,
        ledger: Account | None,
        fleet: Fleet,
        store: ObjectStore,
        entropy_for: EntropyFor | None,
    ) -> None:
        policy = federation.policies[name]
        super().__init__(federation.model.schema, joined.spec, policy, ledger, personal=personal_folder(policy))
        self._fleet, self._store = fleet, store
        self._client = name, [store.put(ClientData(federation.clients[name], policy, entropy_for))]
        self.seconds: float | None = None
        """How long its last round took on an actor; None before the first."""

    @property
    def declared_examples(self) -> int:
        """What the coordinator is told: the policy's figure."""
        return self.policy.data.declared_examples or 0

    def train(self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled) -> Trained:
        """Have a round's steps done from `broadcast`; raises what `Trainer.train` does."""
        admitted = self.admit(run, assignment, broadcast)
        check_cancelled()
        receipt = None
        if admitted.charge is not None:
            evaluation = evaluation_spend(self.spec) if admitted.evaluating else None
            receipt = Receipt(run, assignment.round, training_spend(self.spec), evaluation, admitted.charge)
        order = self._store.order(run, assignment, broadcast)
        answer: Answer = self._fleet.call("train", *self._client, order, receipt, self.personal(run))
        self.seconds = answer.seconds
        if assignment.personal:
            self.keep_personal(run, answer.personal)
        return answer.trained

    def score(self, run: str, result: Tensors, rounds: int) -> tuple[float, ...]:
        """Figures on the model that a run ended with; see `Trainer.score`."""
        admitted = self.admit_result(run, rounds, result)
        if admitted is None:
            return ()
        receipt = None
        if admitted.charge is not None:
            receipt = Receipt(run, rounds, evaluation_spend(self.spec), None, admitted.charge)
        figures: tuple[float, ...] = self._fleet.call(
            "score", *self._client, result, (run, rounds), receipt, self.personal(run)
        )
        self.release_figures(admitted.charge, figures)
        return figures
