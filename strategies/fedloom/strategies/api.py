"""The strategy interface: pure functions over named arrays, and what a strategy declares about itself.

A strategy never sees a socket, a file, a clock or a tensor library. The coordinator calls

1. `init` once, with the run's schema and starting adapter;
2. `plan` for every client of every round: what to broadcast and what to train;
3. `fold` for every accepted update, one at a time and in canonical client order;
4. `commit` once per round: the next state, whose `adapter` is the next global adapter;
5. `result` for whatever is scored, sent at the end or exported: the model of a state.

The same inputs give the same outputs, bit for bit: the coordinator replays them after a crash.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fedloom.core.schema import Array, Schema, Tensors

__all__ = ["Plan", "State", "Strategy", "Traits", "Update", "corrections"]


@dataclass(frozen=True)
class State:
    """Everything a strategy remembers; it is stored as tensors and scalars after every round."""

    schema: Schema
    """Schema of `adapter`, at the largest rank of the run."""
    adapter: Tensors
    """The current global adapter, float32, exactly the schema's tensors."""
    seed: int
    """The run's seed. Draw from `numpy.random.Generator(numpy.random.Philox(key=[seed, round]))`, never globally."""
    round: int = 0
    """Number of commits so far; the first round is planned with round 0."""
    memory: Tensors = field(default_factory=dict)
    """What the strategy carries between rounds (moments, bases, correction factors), by its own names."""


@dataclass(frozen=True)
class Plan:
    """What one client is asked to do in one round."""

    train: frozenset[str]
    """What the client trains, as roles or names of tensors (see `Schema.select`): `state.schema.roles`, {"lora_B"},
    or `state.schema.names("lora_B")` less some. It uploads the change of exactly these, less the personal ones."""
    broadcast: Tensors
    """Values the client loads before it trains: schema tensors (at `rank`), and correction factors of the
    roles base_A and base_B if the strategy folds residuals into the frozen weight."""
    rank: int | None = None
    """Rank this client works at; None is the schema's. The rows beyond it stay zero on the client."""
    personal: frozenset[str] = frozenset()
    """What the client trains and keeps, by role or name: neither uploaded nor overwritten by a broadcast."""
    local: Mapping[str, float] = field(default_factory=dict)
    """Local hyper-parameters that differ from the run file, by their name in [train]: learning_rate,
    momentum, proximal_mu. Privacy parameters are not among them."""
    linear: Tensors = field(default_factory=dict)
    """A term that the client adds to its gradient in every step, after clipping and noise: g + linear. By name of a
    tensor that it uploads, float32, in that one's shape (at `rank`); tensors that are not named get none. It travels
    with the broadcast and in its codec, and each different one is a broadcast of its own."""
    turns: tuple[str, ...] = ()
    """Roles or names that take turns within the round: in step t, counted from 0, what turns[t % len(turns)] selects
    moves, and what only the other turns select rests. What is trained and in no turn moves in every step. What rests is
    no part of the step's gradient: in a private run it is neither clipped nor noised. Empty: everything moves in every
    step."""


@dataclass(frozen=True)
class Update:
    """What one client sends back: how its trained tensors moved."""

    client: str
    weight: float
    """Relative weight, positive and finite: declared examples, or 1 for every client."""
    start: Tensors
    """What the client started from: its plan's broadcast, float32."""
    delta: Tensors
    """Trained value minus start, float32, for the trained tensors that are not personal."""
    staleness: int = 0
    """Commits since that start; above 0 only with `rounds.mode = "buffered"`."""
    linear: Tensors = field(default_factory=dict)
    """The term of its plan that the client added to its gradients, as its broadcast carried it."""
    rate_sums: Mapping[str, float] = field(default_factory=dict)
    """Sum of the learning rates of the client's steps by uploaded tensor, K eta: after K steps of plain SGD,
    -delta / rate_sum is the mean of what they went along, noise and linear term included."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the client's own evaluation says of what it started from, where `[federated_evaluation]` asks for one:
    held_out_rows, accuracy in [0, 1] and loss in nats, each a mean over these rows; with `personalised` also
    personalised_accuracy and personalised_loss, after its own training. In a private run all of them are noised, the
    rows too, and the client's ledger has been charged for them. Empty where the round has no evaluation or the client
    trained it anew, where the rows drown in the noise, and for an update that stands for several clients. Clients can
    lie here as they can about weights."""
    noise_std: float = 0.0
    """Standard deviation of the privacy noise in each value of `delta` that moved in every step, but for the head's,
    which may have a learning rate of its own. It follows from the run file and the client's declared examples. It is 0
    without [privacy], and for strategies whose traits do not say `reads_noise`."""

    def value(self, name: str) -> Array:
        """The client's trained tensor, start + delta, in float64."""
        return self.start[name].astype(np.float64) + self.delta[name].astype(np.float64)


@dataclass(frozen=True)
class Traits:
    """What a strategy declares about itself. The defaults promise nothing; the conformance battery checks the rest.

    Transforms, run files and the coordinator decide by these what may be combined. A strategy that promises too little
    is refused somewhere it could run; one that promises too much breaks a guarantee.
    """

    linear: bool = False
    """Every client gets the same plan, and with uniform weights `commit` depends on the updates only through their
    mean. One update that is the mean then stands for all: user-level privacy, secure aggregation, robust rules and
    server optimizers rely on it."""
    same_tensors: bool = False
    """Every round trains the same tensors. An update that was made from an older state still fits, and noise that is
    added in one round can be taken out in another."""
    rewrites: bool = False
    """`commit` changes the coordinates of trained tensors, as a refactorization of pairs does: what is remembered or
    sent in the old ones means nothing in the new."""
    moments: bool = False
    """`commit` moves the adapter by a step made from the mean and from moments in the tensors' coordinates, as a
    server optimizer does. One client's model is then not the next adapter."""
    linear_moments: bool = False
    """All moments are linear in the changes, as momentum is, and lie in `memory` under "server_optimizer/first/" and
    the tensor's name: what rewrites coordinates can turn them along."""
    lossy: bool = False
    """`commit` leaves out part of what even a single client learnt, as a cut by energy does."""
    keeps_updates: bool = False
    """`fold` keeps every update until `commit`, which must see all of them. Memory is then O(clients), one float32
    copy of each. They come in canonical client order as to every strategy."""
    plain_sgd: bool = False
    """It reads the mean gradient of a client off its change, see `Update.rate_sums`. A run whose clients take other
    steps than those of plain SGD is refused."""
    remembers_clients: bool = False
    """`memory` holds something of every client that ever took part, one float32 copy of the trained tensors each, in
    their coordinates and from their changes as they came: what rewrites the ones or scales the others is refused."""
    unweighted: bool = False
    """Every update counts once, whatever its weight; a run that weighs clients by examples is refused."""
    least_updates: int = 1
    """`commit` raises `ProtocolError` for fewer updates; a run whose `rounds.min_clients` is below it is refused."""
    coded_broadcast: bool = False
    """Plans broadcast what all clients hold, which follows the adapter by coded changes (`CodedBroadcast`)."""
    reads_noise: bool = False
    """It looks at `Update.noise_std`; a private run whose optimizer leaves that unknown is refused."""


class Strategy(Protocol):
    """How a round is planned and how updates become the next adapter.

    Subclass it, or `Composed` of `fedloom.strategies.transforms.transform` to put a strategy together from transforms.
    `acc` is whatever `fold` builds up; it lives only within a round and never leaves memory. Keep it O(adapter), not
    O(clients), unless the method must compare updates (Krum, median).
    """

    @property
    def traits(self) -> Traits:
        """What it declares. A class attribute will do as well, but pyright wants a property."""
        return Traits()

    @abstractmethod
    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The state before the first round.

        Raises:
            SchemaError: The schema lacks what this strategy needs.
        """

    @abstractmethod
    def plan(self, state: State, round: int, client: str) -> Plan:
        """What `client` does in `round` (counted from 0)."""

    def check(self, state: State, update: Update) -> None:
        """Refuse an update that `fold` or `commit` could not take; called once for each, by several threads at a time.

        As inherited it refuses nothing more than the coordinator does: an update whose tensors have other names or
        shapes than the plan says, whose values are not finite or beyond 1e30, or whose weight is not usable.

        Raises:
            SchemaError: A tensor does not fit.
            UpdateRejected: A value does not.
        """
        return None

    @abstractmethod
    def fold(self, state: State, acc: Any, update: Update) -> Any:
        """The accumulator after one more update; `acc` is None for the first.

        Unlike `state` and `update`, `acc` is used up: it may be changed in place, and the old one is not looked at
        again.
        """

    @abstractmethod
    def commit(self, state: State, acc: Any) -> State:
        """The state after the round: a new adapter and `round` one higher."""

    def result(self, state: State) -> Tensors:
        """The model of a state, what a client has that loads it; it is scored, sent at the end of a run and exported.

        As inherited it is the adapter and, of a strategy that corrects frozen weights, what `memory` holds under
        MODULE.base_A and MODULE.base_B of every pair. A plan that broadcasts other corrections is refused.
        """
        return {**state.adapter, **corrections(state)}


def corrections(state: State) -> dict[str, Array]:
    """What the memory holds under the names that corrections have in a broadcast: MODULE.base_A and MODULE.base_B."""
    names = (f"{pair.module}.base_{side}" for pair in state.schema.pairs for side in "AB")
    return {name: state.memory[name] for name in names if name in state.memory}
