"""What runs on the cluster: one resident base model, and the trainers of any number of clients in turn.

Nothing of value lives here. The ledgers, what a client keeps for itself and the updates that wait are with the driver,
so that an actor may die at any moment and another does its work again.
"""

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fedloom.client.data.rows import Rows
from fedloom.client.models.load import load_model
from fedloom.client.policy import ComputePolicy, Policy
from fedloom.client.session.api import Trained
from fedloom.client.training.device import free_bytes
from fedloom.client.training.trainer import EntropyFor, Trainer
from fedloom.core.config.run import Spec
from fedloom.core.errors import PolicyError
from fedloom.core.privacy.accounting import Spend
from fedloom.core.runtime.memory import peak_bytes, status_bytes
from fedloom.core.schema import Tensors
from fedloom.proto.messages import Assignment

__all__ = ["ASIDE", "Answer", "ClientData", "Footprint", "Order", "Receipt", "Resident"]

ASIDE = "aside"
"""Ray's name for the thread that answers beside the one that trains."""
_KEPT_TRAINERS = 64
"""Clients whose tokenized rows an actor keeps at a time."""
_SHARE = 0.8
"""Of a node's free memory; the rest is for what else it does."""


@dataclass(frozen=True)
class ClientData:
    """A client, as it is put into the object store once."""

    rows: Rows
    policy: Policy
    entropy: EntropyFor | None
    """Test seam, see `Trainer`."""


@dataclass(frozen=True)
class Order:
    """What is to be trained, from where: put into the object store once for all clients that are asked the same."""

    run: str
    assignment: Assignment
    broadcast: Tensors


@dataclass(frozen=True)
class Answer:
    """What a round's training leaves."""

    trained: Trained
    personal: Tensors
    seconds: float
    """Time that the training took, without what is done once for each client."""


@dataclass(frozen=True)
class Footprint:
    """Memory of an actor on a CPU that has made its first step, in bytes."""

    peak: int
    """Most that this process alone has had."""
    free: int
    """What its node has left."""

    @property
    def more(self) -> int:
        """Actors that fit beside it."""
        return int(_SHARE * self.free / self.peak)


@dataclass(frozen=True)
class Receipt:
    """What the driver has charged in the client's ledger; it stands in for the ledger where the client is trained.

    It pays for exactly one round's work, or for the scoring of one result, however often that has to be begun.
    """

    run: str
    round: int
    spend: Spend
    evaluation: Spend | None
    number: int

    def evaluated(self, run: str, round: int) -> bool:
        """Whether no evaluation is paid for."""
        return self.evaluation is None

    def reserve(
        self,
        run: str,
        round: int,
        spend: Spend,
        *,
        budget: float,
        delta: float,
        evaluation: Spend | None = None,
        noise_bands: int = 1,
    ) -> int:
        """The charge's number, if this is the work that was paid for.

        Raises:
            PolicyError: It is not.
        """
        return self._paid(run, round, spend, evaluation)

    def reserve_result(self, run: str, rounds: int, spend: Spend, *, budget: float, delta: float) -> int:
        """The charge's number, if this is the scoring that was paid for.

        Raises:
            PolicyError: It is not.
        """
        return self._paid(run, rounds, spend, None)

    def release(self, number: int, digest: str) -> None:
        """The driver notes it."""

    def drop(self, why: str | None) -> bool:
        """The driver notes it."""
        return False

    def _paid(self, run: str, round: int, spend: Spend, evaluation: Spend | None) -> int:
        asked, paid = (run, round, spend, evaluation), (self.run, self.round, self.spend, self.evaluation)
        if asked != paid:
            raise PolicyError(f"the driver has paid for {paid}, and {asked} is to be done; nothing is")
        return self.number


class Resident:
    """The actor. Ray runs `load`, `train` and `score` one at a time, and `footprint` beside them.

    Args:
        compute: What it may use of its node.
    """

    def __init__(self, compute: ComputePolicy) -> None:
        self._compute = compute
        self._trainers: OrderedDict[str, Trainer] = OrderedDict()
        self._stepped = threading.Event()

    def load(self, spec: Spec) -> str:
        """Load the run's base model from this node's disk; the version of fedloom here.

        Raises:
            ModelError: There is none, or it is another one than the run pins.
        """
        self._spec, self._model = spec, load_model(spec.model, spec.adapter, self._compute)
        return version("fedloom")

    def train(self, client: str, given: list[Any], order: Order, receipt: Receipt | None, personal: Tensors) -> Answer:
        """Do a client's steps.

        Args:
            client: Its name.
            given: A reference to its `ClientData`, which is fetched where it is not known.
            order: The work.
            receipt: Pays for it; None without privacy.
            personal: What the client has kept for itself so far.
        """
        trainer = self._trainer(client, given, receipt)
        trainer.keep_personal(order.run, personal)
        began, calls = time.monotonic(), 0

        def step() -> None:
            nonlocal calls
            calls += 1
            if calls > 1:
                self._stepped.set()

        trained = trainer.train(order.run, order.assignment, order.broadcast, step)
        self._stepped.set()
        return Answer(trained, trainer.personal(order.run), time.monotonic() - began)

    def score(
        self,
        client: str,
        given: list[Any],
        result: Tensors,
        of: tuple[str, int],
        receipt: Receipt | None,
        personal: Tensors,
    ) -> tuple[float, ...]:
        """A client's figures on the result of a run.

        Args:
            client: Its name.
            given: As for `train`.
            result: The model.
            of: The run's name, and how many rounds made it.
            receipt: Pays for it; None without privacy.
            personal: What the client has kept for itself.
        """
        trainer = self._trainer(client, given, receipt)
        trainer.keep_personal(of[0], personal)
        return trainer.score(*of, result)

    def footprint(self) -> Footprint:
        """Memory after the first step, for which it waits."""
        self._stepped.wait()
        return Footprint(_private_peak(), free_bytes(self._model.device, None) or 0)

    def _trainer(self, name: str, given: list[Any], receipt: Receipt | None) -> Trainer:
        trainer = self._trainers.pop(name, None)
        if trainer is None:
            import ray

            client: ClientData = ray.get(given[0])
            policy = client.policy.model_copy(update={"compute": self._compute})
            trainer = Trainer(self._model, client.rows, self._spec, policy, receipt, entropy_for=client.entropy)
        trainer.ledger = receipt
        self._trainers[name] = trainer
        if len(self._trainers) > _KEPT_TRAINERS:
            self._trainers.popitem(last=False)
        return trainer


def _private_peak() -> int:
    """Most bytes that this process has had resident, less the pages of files and libraries, which all share."""
    return peak_bytes() - status_bytes("RssFile") - status_bytes("RssShmem")
