"""What must be true when a trial is over, whatever was done to it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.server.rounds.state import AdapterCommitted, ClientLost, Event, RoundClosed, RoundOpened, UpdateAccepted
from fedloom.server.storage.local import Store
from tests.chaos import node
from tests.chaos.driver import Failure
from tests.chaos.trial import SPEND, Trial, begun, digest, sent_digests, stepped, undisturbed

__all__ = ["check", "log_of"]


def log_of(events: Sequence[Event]) -> list[dict[str, Any]]:
    """The log without what may differ: the run's random name, the order of arrival, who was away for a while."""
    rounds: dict[int, dict[str, Any]] = {}
    for event in events:
        match event:
            case RoundOpened():
                first = {"accepted": {}, "openings": 0, "first_asked": len(event.cohort)}
                entry = rounds.setdefault(event.round, first)
                entry |= {"cohort": list(event.cohort), "openings": entry["openings"] + 1}
            case UpdateAccepted():
                accepted = rounds[event.round]["accepted"]
                if event.client in accepted:
                    raise Failure(f"two updates of {event.client} in round {event.round}")
                accepted[event.client] = [event.digest, event.weight]
            case RoundClosed():
                rounds[event.round] |= {"folded": list(event.clients), "reason": event.reason}
            case AdapterCommitted():
                rounds[event.round]["state"] = event.state
    return [rounds[number] for number in sorted(rounds)]


def check(trial: Trial, folder: Path, deaths: Mapping[str, int]) -> dict[str, Any]:
    """The normalised log, state and ledgers, once it is sure that they are right.

    Args:
        trial: What was tried.
        folder: Where it was.
        deaths: How many processes of each node did not end by themselves.

    Raises:
        Failure: Something else came out than the same clients give without a coordinator, a client answered a round
            twice, or a ledger counts less than was done.
    """
    with Store(folder / "state") as store:
        events, epoch = store.events(), store.epoch
    log = log_of(events)
    _expect(len(log) == trial.rounds, f"{len(log)} rounds of {trial.rounds}")
    state = begun(trial)
    for number, found in enumerate(log):
        state = stepped(state, found["folded"])
        _expect(sorted(found["accepted"]) == found["folded"], f"round {number} folds not what was accepted")
        _expect(found["state"] == digest(state), f"round {number} gives another state than its updates do")
    if trial.needed is None:
        wanted = undisturbed(trial)
        plain = [
            {key: value for key, value in found.items() if key not in ("openings", "first_asked")} for found in log
        ]
        _expect(plain == wanted, f"the log is not the undisturbed run's: {plain} in place of {wanted}")
    for name in trial.names if trial.private else ():
        spare = _check_client(trial, folder / name, name, log)
        _expect(spare <= deaths[name], f"{name} died {deaths[name]} times and has {spare} charges that gave nothing")
    lost = sum(isinstance(event, ClientLost) for event in events)
    return {"log": log, "state": digest(state), "openings": epoch, "lost": lost}


def _check_client(trial: Trial, folder: Path, name: str, log: list[dict[str, Any]]) -> int:
    """How many charges gave nothing that left, but for one in each round that was closed while the client trained."""
    accepted = {number: found["accepted"][name][0] for number, found in enumerate(log) if name in found["accepted"]}
    with node.account_of(node.policy_of(name, folder)) as ledger:
        charges = ledger.charges()
    charged = Counter(charge.round for charge in charges)
    drawn: list[tuple[int, int]] = []
    if (folder / "drawn.log").exists():
        drawn = [
            (int(a), int(b)) for a, b in (line.split() for line in (folder / "drawn.log").read_text().splitlines())
        ]
    known = {(charge.round, charge.number) for charge in charges}
    _expect(set(drawn) <= known and len(set(drawn)) == len(drawn), f"{name} drew noise without a charge of its own")
    _expect(all(charge.spend == SPEND for charge in charges), f"{name} was charged something else than it did")
    _expect(set(charged) >= set(accepted), f"{name} answered a round without a charge")
    released: dict[int, list[str]] = {}
    for charge in charges:
        if charge.digest is not None:
            released.setdefault(charge.round, []).append(charge.digest)
    sent = sent_digests(folder / "sent.log")
    for round in range(trial.rounds):
        left = set(sent.get(round, ()))
        _expect(len(left) <= 1, f"{name} sent {len(left)} distinct updates for round {round}")
        _expect(len(released.get(round, ())) <= 1, f"{name} released two updates for round {round}")
        _expect(left <= set(released.get(round, ())), f"{name} sent for round {round} what it had not released")
        _expect(round not in accepted or left == {accepted[round]}, f"round {round} has not what {name} sent")
    stopped = charged.keys() - accepted.keys() - released.keys()
    return sum(charge.digest is None for charge in charges) - len(stopped)


def _expect(true: bool, otherwise: str) -> None:
    if not true:
        raise Failure(otherwise)
