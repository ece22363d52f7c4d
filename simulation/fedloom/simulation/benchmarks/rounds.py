"""What the bookkeeping of a round costs for each client: the state machine and the log, without sockets or disk."""

import gc
import math
import statistics
import time
from typing import Any

from fedloom.core.config.run import RunConfig
from fedloom.server.rounds.scheduling import decision
from fedloom.server.rounds.state import (
    AdapterCommitted,
    Event,
    Rounds,
    RunCreated,
    UpdateAccepted,
    apply,
    event_from_json,
    event_to_json,
)

__all__ = ["bench_rounds"]

_DOUBLINGS = 2


def bench_rounds(*, clients: int, rounds: int) -> dict[str, Any]:
    """Play rounds in which every client answers, and read their log back as a coordinator does that starts again.

    A round is played as the coordinator plays it: after each update it asks what is due next. A quarter of the clients
    is measured likewise.

    Args:
        clients: Clients in each round, at least 16.
        rounds: Rounds to measure for each number of clients, after one to warm up.

    Returns:
        state_machine_s_per_round: the median round, played and read back, in CPU seconds: one thread does all of it,
        and what else the machine does matters less than to a clock. playing_s_per_round and folding_s_per_round are
        its two parts, the second without the parsing of the log. growth_per_doubling: how many times as long a round
        takes for twice as many clients.
    """
    smallest = _measured(clients >> _DOUBLINGS, rounds)
    playing_s, folding_s = _measured(clients, rounds)
    growth = ((playing_s + folding_s) / sum(smallest)) ** (1 / math.log2(clients / (clients >> _DOUBLINGS)))
    return {
        "state_machine_s_per_round": playing_s + folding_s,
        "growth_per_doubling": growth,
        "playing_s_per_round": playing_s,
        "folding_s_per_round": folding_s,
        "clients": clients,
        "rounds": rounds,
    }


def _measured(clients: int, rounds: int) -> tuple[float, float]:
    """Median seconds of a round: played, and folded from its log."""
    config = RunConfig.model_validate(
        {
            "run": {"name": "bench-rounds", "rounds": rounds + 1},
            "model": {"base": "none", "labels": ["a", "b"]},
            "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
            "privacy": {"enabled": False},
            "rounds": {"min_clients": clients},
            "wire": {"upload": "fp32", "broadcast": "fp32"},
        }
    )
    names = [f"client-{number}" for number in range(clients)]
    created = RunCreated("bench", "spec", "schema", "state-0")
    played = read = apply(Rounds(), created)
    playing_s: list[float] = []
    folding_s: list[float] = []
    for number in range(rounds + 1):
        gc.collect()
        updates = [UpdateAccepted(number, name, "digest", 1.0) for name in names]
        began_s = time.process_time()
        played, log = _play(played, config, frozenset(names), updates)
        playing_s.append(time.process_time() - began_s)
        events = [event_from_json(event_to_json(event)) for event in log]
        began_s = time.process_time()
        for event in events:
            read = apply(read, event)
        folding_s.append(time.process_time() - began_s)
        assert played == read, f"round {number + 1} reads otherwise than it was played"
    return statistics.median(playing_s[1:]), statistics.median(folding_s[1:])


def _play(
    rounds: Rounds, config: RunConfig, live: frozenset[str], updates: list[UpdateAccepted]
) -> tuple[Rounds, list[Event]]:
    """One round from its opening to its commit, and its events."""
    coming, log = iter(updates), list[Event]()
    while rounds.phase != "closed":
        event = decision(rounds, live, config, 0.0) or next(coming)
        rounds = apply(rounds, event)
        log.append(event)
    log.append(AdapterCommitted(rounds.round, f"state-{rounds.round + 1}"))
    return apply(rounds, log[-1]), log
