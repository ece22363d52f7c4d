"""The coordinator's rounds over nodes that come, go, fail and lie."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedloom.client.policy import Policy
from fedloom.core.config.run import RunConfig, Spec
from fedloom.core.schema import Schema, Tensors
from fedloom.flower.messages import Reply, Request, from_head
from fedloom.flower.resident_trainer import Resident
from fedloom.flower.rounds import Answered, coordinate
from fedloom.proto.message_codec import to_json
from fedloom.proto.messages import Joined
from fedloom.server.build import build_strategy
from fedloom.server.coordinator import Coordinator
from fedloom.server.rounds.state import ClientLost, Event, RoundClosed, RunCreated
from fedloom.server.storage.local import Store
from fedloom.strategies.start import starting_adapter
from tests.flower.conftest import SCHEMA, Site


@dataclass
class Sites:
    """Nodes whose messages go to residents in this process, through the same bytes as over Flower."""

    residents: dict[int, Resident]
    up: set[int] = field(default_factory=set)
    change: Callable[[int, Request], tuple[bytes, bytes] | str | None] = lambda _node, _request: None
    asked: list[tuple[int, Request]] = field(default_factory=list)
    waiting: dict[str, tuple[int, bytes, bytes]] = field(default_factory=dict)

    def online(self) -> Collection[int]:
        return set(self.up)

    def ask(self, node: int, head: bytes, payload: bytes, *, work: bool) -> str:
        name = f"message-{len(self.asked)}"
        request = from_head(Request, head)
        assert work == (request.assignment is not None)
        self.asked.append((node, request))
        self.waiting[name] = node, head, payload
        return name

    def answers(self, messages: Collection[str]) -> Iterable[Answered]:
        for name in sorted(messages, reverse=True):  # the last asked is the first to answer
            node, head, payload = self.waiting.pop(name)
            request = from_head(Request, head)
            changed = self.change(node, request)
            if isinstance(changed, str):
                yield Answered(name, b"", b"", changed)
            elif changed is not None:
                yield Answered(name, *changed)
            else:
                reply, update = self.residents[node].answer(request, payload)
                yield Answered(name, to_json(reply), update)

    def rounds_of(self, node: int) -> list[int]:
        return [request.assignment.round for each, request in self.asked if each == node and request.assignment]


NAMES = ("client-0", "client-1", "client-2")


@pytest.fixture
def config(spec: Spec) -> RunConfig:
    """A private two-round run of three clients."""
    document = spec.model_dump() | {
        "rounds": {"min_clients": 3, "max_update_norm": 1e30},
        "strategy": {"weighting": "examples"},
    }
    return RunConfig.model_validate(document)


@pytest.fixture
def sites(policy: Policy, tmp_path: Path) -> Iterator[Sites]:
    """Three sites, at nodes whose numbers are in another order than the names."""
    made = Sites({})
    for node, name in enumerate(reversed(NAMES)):
        client = policy.client.model_copy(update={"name": name, "state": tmp_path / name})
        made.residents[node] = Site(policy.model_copy(update={"client": client})).start()
    made.up = set(made.residents)
    yield made
    for resident in made.residents.values():
        resident.close()


Run = Callable[[Sites, RunConfig], list[Event]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs all rounds; the log."""

    def go(sites: Sites, config: RunConfig) -> list[Event]:
        with Store(tmp_path / "state", durable=False) as store:
            coordinated(sites, coordinator_of(config, SCHEMA, store), store)
            return store.events()

    return go


def coordinator_of(config: RunConfig, schema: Schema, store: Store) -> Coordinator:
    starting = starting_adapter(schema, config.run.seed)
    return Coordinator(config, schema, build_strategy(config), store, starting=starting)


def coordinated(sites: Sites, coordinator: Coordinator, store: Store) -> Tensors:
    """The adapter after all rounds."""
    (created,) = [event for event in store.events() if isinstance(event, RunCreated)]
    joined = Joined(created.run, coordinator.epoch, coordinator.config.spec, coordinator.state.schema)
    looks = iter(range(200))

    def pause() -> None:
        if next(looks, None) is None:
            pytest.fail("no end")

    coordinate(coordinator, joined, sites, pause=pause)
    return coordinator.state.adapter


def needing(config: RunConfig, clients: int, rounds: int = 2) -> RunConfig:
    sections = {
        "rounds": config.rounds.model_copy(update={"min_clients": clients}),
        "run": config.run.model_copy(update={"rounds": rounds}),
    }
    return config.model_copy(update=sections)


def closed(log: list[Event]) -> list[tuple[str, ...]]:
    return [event.clients for event in log if isinstance(event, RoundClosed)]


def test_a_message_that_was_lost_is_sent_again_and_answered_with_the_same_bytes(
    sites: Sites, config: RunConfig, run: Run
) -> None:
    """The ClientApp's process died after its site had made the update."""
    lost: list[tuple[Reply, bytes]] = []
    sent: list[tuple[Reply, bytes]] = []
    answer = sites.residents[0].answer

    def noted(request: Request, payload: bytes) -> tuple[Reply, bytes]:
        made = answer(request, payload)
        if request.assignment is not None and request.assignment.round == 1:
            (sent if lost else lost).append(made)
        return made

    def change(node: int, request: Request) -> str | None:
        if node == 0 and request.assignment is not None and request.assignment.round == 1 and not lost:
            payload = payloads[0]
            sites.residents[0].answer(request, payload)
            return "the process died"
        return None

    payloads: dict[int, bytes] = {}
    ask = sites.ask

    def remembered(node: int, head: bytes, payload: bytes, *, work: bool) -> str:
        payloads[node] = payload
        return ask(node, head, payload, work=work)

    sites.ask, sites.residents[0].answer = remembered, noted  # type: ignore[method-assign]
    sites.change = change
    log = run(sites, config)

    assert sent == lost
    assert closed(log) == [("client-0", "client-1", "client-2")] * 2
    assert sites.rounds_of(0) == [0, 1, 1]
    assert sites.rounds_of(1) == [0, 1]


def test_a_site_that_refuses_is_not_asked_again_and_the_round_goes_on_without_it(
    sites: Sites, config: RunConfig, run: Run
) -> None:

    def change(node: int, request: Request) -> tuple[bytes, bytes] | None:
        if node == 0 and request.assignment is not None:
            return to_json(Reply("client-2", refusal="refused")), b""
        return None

    sites.change = change
    log = run(sites, needing(config, 2))

    assert closed(log) == [("client-0", "client-1")] * 2
    assert sites.rounds_of(0) == [0]
    assert [event.client for event in log if isinstance(event, ClientLost)] == ["client-2"]


@pytest.mark.parametrize(
    "forged",
    [
        lambda update: (update[0].replace(b'"client-2"', b'"client-1"'), update[1]),
        lambda update: (update[0], update[1][:-1] + b"\x7f"),
        lambda update: (update[0], b""),
        lambda update: (b"{}", update[1]),
    ],
    ids=["another name", "another byte", "no payload", "no head"],
)
def test_an_update_that_is_not_what_it_says_is_not_taken(
    sites: Sites,
    config: RunConfig,
    run: Run,
    forged: Callable[[tuple[bytes, bytes]], tuple[bytes, bytes]],
) -> None:
    payloads: dict[int, bytes] = {}
    ask = sites.ask

    def remembered(node: int, head: bytes, payload: bytes, *, work: bool) -> str:
        payloads[node] = payload
        return ask(node, head, payload, work=work)

    def change(node: int, request: Request) -> tuple[bytes, bytes] | None:
        if node == 0 and request.assignment is not None:
            reply, update = sites.residents[0].answer(request, payloads[0])
            return forged((to_json(reply), update))
        return None

    sites.ask, sites.change = remembered, change  # type: ignore[method-assign]
    log = run(sites, needing(config, 2))

    assert closed(log) == [("client-0", "client-1")] * 2
    assert sites.rounds_of(0) == [0, 0, 0], "three times, and then it is left alone"


def test_a_second_node_under_one_name_waits_until_the_first_is_gone(sites: Sites, config: RunConfig, run: Run) -> None:
    """A SuperNode that was started anew is a new node, and the old one looks alive for a while."""
    sites.residents[7] = sites.residents[0]
    before: list[int] = []

    def change(node: int, request: Request) -> str | None:
        if node == 0 and request.assignment is not None and request.assignment.round == 1:
            before.extend(sites.rounds_of(7))
            sites.up.discard(0)
            return "gone"
        if request.assignment is not None:
            sites.up.add(7)
        return None

    sites.change = change
    log = run(sites, config)

    assert before == []
    assert closed(log) == [("client-0", "client-1", "client-2")] * 2
    assert sites.rounds_of(7) == [1]


def test_a_node_that_goes_away_leaves_its_round_and_may_come_back(sites: Sites, config: RunConfig, run: Run) -> None:
    away: list[int] = []

    def change(node: int, request: Request) -> str | None:
        round = request.assignment.round if request.assignment else -1
        if round == 0 and node == 0 and not away:
            away.append(node)
            sites.up.discard(0)
            return "gone"
        if round == 1:
            sites.up.add(0)
        return None

    sites.change = change
    log = run(sites, needing(config, 2, rounds=6))

    assert [(event.round, event.client) for event in log if isinstance(event, ClientLost)] == [(0, "client-2")]
    assert closed(log)[0] == ("client-0", "client-1")
    assert closed(log)[-1] == ("client-0", "client-1", "client-2")


def test_a_site_that_declares_nothing_is_left_out_of_a_run_that_weighs_by_examples(
    sites: Sites, config: RunConfig, run: Run
) -> None:

    def change(node: int, request: Request) -> tuple[bytes, bytes] | None:
        return (to_json(Reply("client-2")), b"") if node == 0 else None

    sites.change = change
    log = run(sites, needing(config, 2))

    assert closed(log) == [("client-0", "client-1")] * 2
    assert sites.rounds_of(0) == []
