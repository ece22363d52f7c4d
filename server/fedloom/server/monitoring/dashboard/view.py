"""What the page shows of one run, as plain JSON values: from the log, the run file, the records and the coordinator.

Nothing of it is about what one client's data say: training losses, example counts and clipping rates never leave a
client, and what clients release of their held-out rows is shown for all of them together.
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, TypeVar

from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError
from fedloom.server.monitoring.progress import Progress
from fedloom.server.monitoring.recorders.api import RoundRecord
from fedloom.server.monitoring.recorders.background import spent_after
from fedloom.server.monitoring.round_times import Answers
from fedloom.server.privacy.user_ledger import spent as user_spent
from fedloom.server.rounds.evaluation import federated_score
from fedloom.server.storage.follow import Journal

__all__ = ["CLIENTS", "Spent", "document", "past_rounds", "traffic"]

CLIENTS = 200
"""Most clients that are listed; those with something to see come first."""

T = TypeVar("T")

_POINTS = 300
_SPENT_POINTS = 40
_ROUNDS = 20
_HAPPENED = 100
_SIMULATED = ("data", "engine")
_SHOWN = {
    "model": ("base", "task"),
    "adapter": ("kind", "rank"),
    "train": ("optimizer",),
    "privacy": ("enabled", "epsilon", "delta"),
    "strategy": ("name", "weighting"),
    "rounds": ("min_clients", "deadline_s", "give_up_s"),
}
"""Keys that are shown with their default too."""
_ORDER = ("lost", "training", "sent", "waiting", "gone", "unknown")


class Spent:
    """Epsilon by the number of rounds a client was asked for. Accounting takes time, so each call does a little of it.

    Args:
        config: A calibrated run file.
        share_s: Seconds of accounting in one call of `of`; what is left is None until a later call.
        clock: Seconds, never going back.
    """

    def __init__(self, config: RunConfig, share_s: float = 0.3, clock: Callable[[], float] = time.perf_counter) -> None:
        self._config, self._share_s, self._clock = config, share_s, clock
        self._known: dict[int, float] = {0: 0.0}

    def of(self, counts: Sequence[int]) -> dict[int, float | None]:
        """Epsilon for each count, the first ones first."""
        if not self._config.privacy.enabled or self._config.privacy.noise_multiplier is None:
            return dict.fromkeys(counts)
        end_s = self._clock() + self._share_s
        for count in counts:
            if count not in self._known and self._clock() < end_s:
                with suppress(ConfigError):  # there is no finite epsilon
                    self._known[count] = spent_after(self._config, count).epsilon
        return {count: self._known.get(count) for count in counts}


def document(
    journal: Journal,
    config: RunConfig | None,
    records: Sequence[RoundRecord],
    progress: Progress | None,
    spent: Spent | None,
) -> dict[str, Any]:
    """Everything the page shows of a run but its name.

    Args:
        journal: Its logs, just refreshed.
        config: Its run file; None if that is not known.
        records: What metrics.jsonl has.
        progress: Where it stands in this process; None if no coordinator of this process runs it.
        spent: Epsilon of it; None if the run file is not known.
    """
    past, scored = _thinned(journal.past, _SPENT_POINTS), journal.rounds.scored.values()
    counts = journal.asked.counts
    wanted = [0, journal.asked.most, *sorted(set(counts.values()), reverse=True), *(each.most_asked for each in past)]
    epsilon: dict[int, float | None] = spent.of(list(dict.fromkeys(wanted))) if spent else {}
    sent = traffic(records, journal)
    clients = _clients(journal, progress, epsilon)
    total = config.run.rounds if config else None
    return {
        "run": journal.rounds.created.run if journal.rounds.created else None,
        "starts": journal.starts,
        "round": journal.rounds.round,
        "rounds": total,
        "took_s": _took_s(journal),
        "left_s": journal.pace.left_s(total - journal.rounds.round) if total and progress and progress.open else None,
        "phase": _phase(journal, config, progress),
        "open": _open_round(journal, config, progress),
        "totals": {
            "up": sum(up for _, up, _ in sent),
            "down": sum(down for _, _, down in sent),
            "accepted": journal.accepted.total(),
            "lost": dict(journal.lost),
            "noted": dict(journal.noted),
            "live": len(progress.live) if progress else None,
        },
        "codecs": progress.codecs if progress else None,
        "clients": clients[:CLIENTS],
        "clients_total": len(clients),
        "states": Counter(each["state"] for each in clients),
        "curves": {
            **_scores(records, (journal.rounds.round, federated_score(config, scored)) if config and scored else None),
            "epsilon": _curve([(each.round + 1, epsilon.get(each.most_asked)) for each in past]),
            "traffic": _thinned(sent, _POINTS),
        },
        "past": past_rounds(journal, sent)[:_ROUNDS],
        "answers": [_answers(each) for each in reversed(journal.pace.answers)],
        "privacy": _privacy(config, epsilon.get(journal.asked.most), journal.rounds.round),
        "happened": _happened(journal),
        "config": _config(config) if config else None,
    }


def _scores(
    records: Sequence[RoundRecord], result: tuple[int, dict[str, float | None] | None] | None
) -> dict[str, Any]:
    """Curves of accuracy and loss: on the federation's own held-out rows, or else by the clients on theirs.

    A client scores the adapter that a round starts from, which is the one that the round before it has left, and at the
    end the `result` after so many rounds.
    """
    held_out: list[tuple[int, float | None, float | None]]
    held_out = [(each.round, each.accuracy, each.loss) for each in records if each.accuracy is not None]
    told = [(each.round - 1, each.federated) for each in records if each.federated is not None]
    told += [(result[0], result[1])] if result and result[1] else []
    points = held_out or [(number, score.get("accuracy"), score.get("loss")) for number, score in told]
    last = told[-1][1] if told else {}
    return {
        "scored_by": "held-out" if held_out else "clients" if told else None,
        "accuracy": _curve([(number, accuracy) for number, accuracy, _ in points]),
        "loss": _curve([(number, loss) for number, _, loss in points]),
        "standard_error": None if held_out else last.get("standard_error"),
        "accuracy_margin": None if held_out else last.get("accuracy_margin"),
        "loss_margin": None if held_out else last.get("loss_margin"),
        "personalised": last.get("personalised_accuracy"),
        "personalised_margin": last.get("personalised_accuracy_margin"),
    }


def _phase(journal: Journal, config: RunConfig | None, progress: Progress | None) -> str:
    if journal.rounds.phase == "over" or (config is not None and journal.rounds.round >= config.run.rounds):
        return "over"
    if progress is None:
        return "stopped"
    return "open" if progress.open else "waiting"


def _open_round(journal: Journal, config: RunConfig | None, progress: Progress | None) -> dict[str, Any] | None:
    """The round that is open, or what the next one waits for; None where no coordinator is at work."""
    if progress is None or config is None or progress.over:
        return None
    return {
        "round": progress.round,
        "attempt": journal.rounds.attempt,
        "elapsed_s": progress.elapsed_s,
        "deadline_s": config.rounds.deadline_s,
        "asked": len(progress.cohort),
        "accepted": len(progress.submitted),
        "lost": len(progress.lost),
        "needed": progress.needed,
        "short": progress.short,
        "waiting": progress.waiting,
        "waiting_s": progress.waiting_s,
        "refusing": list(progress.refusing),
    }


def _clients(journal: Journal, progress: Progress | None, epsilon: dict[int, float | None]) -> list[dict[str, Any]]:
    names = journal.asked.counts.keys() | journal.joined.keys() | (progress.seen_ago.keys() if progress else set())
    live, sent = (set(progress.live), set(progress.submitted)) if progress else (set(), set())
    asked = set(progress.cohort) if progress and progress.open else set()
    found = []
    for name in names:
        lost = progress.lost.get(name, "") if progress and progress.open else ""
        down, up = journal.traffic.clients.get(name, (None, None))
        count = journal.asked.counts[name]
        found.append(
            {
                "name": name,
                "state": _state(name, lost, live, asked, sent) if progress else "unknown",
                "why": lost,
                "seen_s": progress.seen_ago.get(name) if progress else None,
                "joined": journal.joined.get(name),
                "asked": count,
                "accepted": journal.accepted[name],
                "epsilon": epsilon.get(count),
                "up": up,
                "down": down,
            }
        )
    return sorted(found, key=lambda each: (_ORDER.index(each["state"]), each["name"]))


def _state(name: str, lost: str, live: set[str], asked: set[str], sent: set[str]) -> str:
    if lost:
        return "lost"
    if name in sent:
        return "sent"
    if name not in live:
        return "gone"
    return "training" if name in asked else "waiting"


def _privacy(config: RunConfig | None, most: float | None, rounds: int) -> dict[str, Any] | None:
    """The promise and how much of it is spent, by the client that was asked most often."""
    if config is None:
        return None
    private, user = config.privacy, config.user_level
    return {
        "enabled": private.enabled,
        "epsilon": private.epsilon,
        "delta": private.delta,
        "noise_multiplier": private.noise_multiplier,
        "most": most,
        "user_level": {"epsilon": user.epsilon, "delta": user.delta, "spent": user_spent(user, rounds)}
        if user.enabled
        else None,
    }


def traffic(records: Sequence[RoundRecord], journal: Journal) -> list[tuple[int, int, int]]:
    """(round from 1, bytes up, bytes down), as the state directory has it, and for earlier builds' as recorded."""
    found = {each.round: (each.bytes_up, each.bytes_down) for each in records if each.round}
    for number, (down, up) in journal.traffic.rounds.items():
        before = found.get(number + 1, (0, 0))
        found[number + 1] = max(before[0], up), max(before[1], down)
    return [(number, *found[number]) for number in sorted(found)]


def past_rounds(journal: Journal, sent: Sequence[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """The committed rounds, newest first, with the bytes that `traffic` gives."""
    moved = {number: (up, down) for number, up, down in sent}
    return [
        {
            "round": each.round + 1,
            "clients": each.clients,
            "lost": each.lost,
            "reason": each.reason,
            "took_s": each.took_s,
            "done_s": each.done_s,
            "up": moved.get(each.round + 1, (None, None))[0],
            "down": moved.get(each.round + 1, (None, None))[1],
        }
        for each in reversed(journal.past)
    ]


def _took_s(journal: Journal) -> float | None:
    """From the first opening to the newest commit."""
    pace = journal.pace
    if pace.began_s is None or pace.ended_s is None or pace.ended_s < pace.began_s:
        return None
    return pace.ended_s - pace.began_s


def _answers(answers: Answers) -> dict[str, Any]:
    """What came of a round's clients: seconds, why it was lost, or that nothing came."""
    pending = [client for client in sorted(answers.pending) if client not in answers.took_s]
    return {
        "round": answers.round + 1,
        "took_s": dict(itertools.islice(answers.took_s.items(), CLIENTS)),
        "lost": dict(itertools.islice(answers.lost.items(), CLIENTS)),
        "pending": pending[:CLIENTS],
    }


def _happened(journal: Journal) -> list[dict[str, str]]:
    """The newest lines of what happened, newest first; those of unknown time last."""
    both = sorted(reversed((*journal.trouble, *journal.happened)), key=lambda each: each.at, reverse=True)
    return [asdict(each) for each in both[:_HAPPENED]]


def _config(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The keys that were chosen, and those that everybody asks for; what is switched off or not used is left out."""
    chosen: dict[str, dict[str, Any]] = {}
    full = config.model_dump(mode="json", exclude_none=True)
    given = config.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    for section, keys in full.items():
        if section in _SIMULATED or (isinstance(keys, dict) and keys.get("enabled") is False and section != "privacy"):
            continue
        wanted = {*given.get(section, ()), *_SHOWN.get(section, ())}
        if found := {key: value for key, value in keys.items() if key in wanted and value not in ({}, [])}:
            chosen[section] = found
    return chosen


def _curve(points: Sequence[tuple[int, float | None]]) -> list[tuple[int, float]]:
    return _thinned(
        [(number, value) for number, value in points if value is not None and math.isfinite(value)], _POINTS
    )


def _thinned(points: "Sequence[T]", most: int) -> "list[T]":
    """At most about `most` of the points, the first and the last among them."""
    step = max(1, len(points) // most)
    kept = list(points[::step])
    return kept if not points or kept[-1] is points[-1] else [*kept, points[-1]]
