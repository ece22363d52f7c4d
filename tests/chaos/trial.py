"""One small federation: its run file, what its clients send, and what the run must come to.

Imports nothing that holds a failpoint, so that it may be loaded before they are armed.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fedloom.core.codecs import codec
from fedloom.core.config.run import RunConfig
from fedloom.core.privacy.accounting import Spend
from fedloom.core.schema import Array, Role, Schema, Tensors, TensorSpec
from fedloom.strategies.api import State, Update
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.state import state_to_bytes

SCHEMA = Schema(
    (
        TensorSpec("m.lora_A.weight", "m", Role.LORA_A, (2, 6)),
        TensorSpec("m.lora_B.weight", "m", Role.LORA_B, (4, 2)),
    )
)
SPEND = Spend(sampling_rate=0.5, noise_multiplier=5.0, steps=1)
DELTA = 1e-5
BUDGET = 1e4
"""Never spent: a client that is killed may charge a round twice."""
_LARGE = 2.0**40


@dataclass(frozen=True)
class Trial:
    """What a federation is made of; everything it comes to follows from this."""

    clients: int = 3
    rounds: int = 3
    needed: int | None = None
    """Updates that a round needs; None waits for all clients, so that no clock decides anything."""
    selected: int | None = None
    """Updates wanted in a round; None asks all."""
    dropout_rate: float = 0.0
    """Share of those asked of whom the coordinator expects no answer."""
    deadline_s: float = 600.0
    lease_s: float = 60.0
    pause_s: float = 0.02
    """Length of a training."""
    linger_s: float = 2.0
    private: bool = True
    crowd: int = 0
    """Processes that the clients share as threads; 0 gives each its own, as everywhere but where there are many."""

    @property
    def names(self) -> tuple[str, ...]:
        """The clients."""
        return tuple(f"c{number}" for number in range(self.clients))

    @property
    def nodes(self) -> tuple[str, ...]:
        """The processes of clients."""
        return tuple(f"crowd{number}" for number in range(self.crowd)) or self.names

    @property
    def config(self) -> RunConfig:
        """The run file."""
        return RunConfig.model_validate(
            {
                "run": {"name": "chaos", "rounds": self.rounds, "seed": 1},
                "model": {"base": "none", "labels": ["a", "b"]},
                "train": {"steps": SPEND.steps, "sampling_rate": SPEND.sampling_rate, "learning_rate": 1.0},
                "privacy": {"enabled": self.private, "noise_multiplier": SPEND.noise_multiplier, "delta": DELTA},
                "rounds": {
                    "min_clients": self.needed or self.clients,
                    "max_update_norm": 1e15,  # the changes of two clients are enormous, and nearly cancel
                    "clients_per_round": self.selected,
                    "dropout_rate": self.dropout_rate,
                    "deadline_s": self.deadline_s,
                    "lease_s": self.lease_s,
                },
            }
        )

    def to_json(self) -> dict[str, object]:
        """For `Trial(**...)` in another process."""
        return asdict(self)


def change(client: str, round: int, again: int, start: Tensors) -> dict[str, Array]:
    """What a client sends: drawn from its name and the round, and another draw for each time bytes had left before.

    The first client's change is small beside those of the others, which nearly cancel: a sum in another order than
    the canonical one has another value.
    """
    large = {"c1": _LARGE, "c2": -_LARGE}.get(client, 0.0)
    number = int(client[1:])
    found = {}
    for spec in SCHEMA.tensors:
        common = np.random.default_rng([round, spec.shape[0]]).uniform(1, 2, spec.shape)
        own = np.random.default_rng([number, round, again, spec.shape[0]]).normal(size=spec.shape)
        found[spec.name] = (0.1 * start[spec.name] + large * common + own).astype(np.float32)
    return found


def begun(trial: Trial) -> State:
    """The strategy's first state."""
    return FedAvg().init(SCHEMA, starting_adapter(SCHEMA, trial.config.run.seed), trial.config.run.seed)


def stepped(state: State, clients: Iterable[str]) -> State:
    """The state after a round of these clients, computed without a coordinator."""
    strategy, acc = FedAvg(), None
    for client in sorted(clients):
        delta = change(client, state.round, 0, state.adapter)
        acc = strategy.fold(state, acc, Update(client, 1.0, state.adapter, delta))
    return strategy.commit(state, acc)


def undisturbed(trial: Trial) -> list[dict[str, object]]:
    """The log of a run of all clients, as `oracle.log_of` gives it, computed without a coordinator."""
    state, log = begun(trial), list[dict[str, object]]()
    for round in range(trial.rounds):
        accepted: dict[str, object] = {}
        for name in trial.names:
            payload = codec("fp32").encode(SCHEMA, change(name, round, 0, state.adapter))
            accepted[name] = [hashlib.sha256(payload).hexdigest(), 1.0]
        state = stepped(state, trial.names)
        names = sorted(trial.names)
        log.append(
            {"cohort": names, "accepted": accepted, "folded": names, "reason": "complete", "state": digest(state)}
        )
    return log


def digest(state: State) -> str:
    """As the log names it."""
    return hashlib.sha256(state_to_bytes(state)).hexdigest()


def sent_digests(path: Path) -> Mapping[int, list[str]]:
    """What left a client for each round, from the notes it made before every first byte."""
    found: dict[int, list[str]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        round, sent = line.split()
        found.setdefault(int(round), []).append(sent)
    return found


def note(path: Path, line: str) -> None:
    """Add a line to a file; it outlives this process, though not a power cut."""
    with path.open("a") as file:
        file.write(f"{line}\n")
