"""What a run waits for, in words, and whether it waits in vain."""

from collections.abc import Collection

from fedloom.core.config.run import RunConfig
from fedloom.server.rounds.state import Rounds

__all__ = ["Patience", "refusal", "waiting"]

_SAY_AFTER_S = 10.0
_SAY_AGAIN_S = 300.0


def waiting(rounds: Rounds, live: Collection[str], refusing: Collection[str], config: RunConfig, needed: int) -> str:
    """What keeps the run from going on that clients could change; empty if nothing does.

    Args:
        rounds: Where the run stands.
        live: Clients whose lease has not lapsed.
        refusing: Clients that have said that they refuse the run.
        config: The run file.
        needed: Clients without which the next round does not open.
    """
    number, least = rounds.round + 1, config.rounds.min_clients
    possible = len(rounds.updates) + len(rounds.pending)
    missing = sorted(set(config.rounds.expected) - set(live)) if rounds.round == 0 else []
    if rounds.phase == "open" and rounds.max_staleness is None and possible < least:
        what = f"round {number} can reach only {possible} of the {least} updates it needs, and waits for more clients"
    elif rounds.phase == "idle" and rounds.round < config.run.rounds and missing:
        what = f"round {number} waits for {', '.join(missing)} of rounds.expected"
    elif rounds.phase == "idle" and rounds.round < config.run.rounds and len(live) < needed and not rounds.starts:
        what = f"round {number} waits for clients: {len(live)} of {needed} are here"
    else:
        return ""
    return what + (f"; {', '.join(sorted(refusing))} refused to take part, their own logs say why" if refusing else "")


def refusal(client: str, committed: int) -> str:
    """What is said of a client that refuses the run; after a committed round, what a backup that was put back does.

    Its clients have answered the rounds that the backup has forgotten, and answer none of them again. The coordinator
    cannot know of those rounds, so it says what follows if it is so.
    """
    said = f"{client} refuses to take part; its own log says why"
    if not committed:
        return said
    return (
        f"{said}. If that is a round answered before, this state was put back from a backup, and the run cannot go on: "
        f"end it with its {committed} rounds by `fedloom operate finish`, or begin a new run in another directory"
    )


class Patience:
    """How long a run has been waiting, and when to say so.

    Attributes:
        what: What it waits for; empty if for nothing.
        seconds: How long it has done so.
    """

    def __init__(self) -> None:
        self.what, self.seconds = "", 0.0
        self._since_s, self._said, self._said_s = 0.0, "", 0.0

    def look(self, what: str, now_s: float) -> str:
        """Take in what it waits for now; what is to be said aloud, if anything."""
        if not what or not self.what:
            self._since_s, self._said = now_s, ""
        self.what, self.seconds = what, now_s - self._since_s
        due = what != self._said or now_s - self._said_s >= _SAY_AGAIN_S
        if not what or not due or self.seconds < _SAY_AFTER_S:
            return ""
        self._said, self._said_s = what, now_s
        return what
