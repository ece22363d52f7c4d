"""The entries of a ledger, each bound to the one before it by a hash, and the charges they add up to."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedloom.core.errors import ConfigError, LedgerError
from fedloom.core.privacy.accounting import Spend

__all__ = [
    "ADOPTED",
    "CHARGED",
    "DROPPED",
    "FAILED",
    "OPENED",
    "OVER",
    "RELEASED",
    "Charge",
    "Entry",
    "account_of",
    "charge_content",
    "charges_of",
    "linked",
    "note",
    "totals",
    "unlinked",
]

OPENED = "opened"
"""First entry: the account's name and id."""
CHARGED = "charged"
"""What a round of a run costs, reserved for it."""
RELEASED = "released"
"""Digest of what leaves the client for a charge."""
DROPPED = "dropped"
"""A charge of which nothing ever leaves the client, and why."""
ADOPTED = "adopted"
"""An operator's word that the account goes on from here, and why."""

FAILED = "failed"
"""Why a charge was dropped: the round's work failed here, and would fail again."""
OVER = "over"
"""Why a charge was dropped: the round was closed without this client."""

_START = "0" * 64


@dataclass(frozen=True)
class Entry:
    """One row of a ledger.

    Args:
        number: Counted from 1, without gaps.
        written: Seconds since 1970 by this machine's clock. For people only; nothing is decided by it.
        kind: `OPENED`, `CHARGED`, `RELEASED`, `DROPPED` or `ADOPTED`.
        body: What it says, canonical JSON.
        hash: SHA-256, hex, over all of the above and the hash of the entry before it.
    """

    number: int
    written: float
    kind: str
    body: str
    hash: str


@dataclass(frozen=True)
class Charge:
    """What was reserved for a round, and the digest of what was released for it, if anything."""

    number: int
    run: str
    round: int
    spend: Spend
    """The round's training."""
    digest: str | None
    evaluation: Spend | None = None
    """The round's evaluation of held-out rows, if it has one."""
    dropped: str | None = None
    """Why nothing leaves for it: `FAILED` or `OVER`. None too for a charge whose process ended before it could say."""
    result: bool = False
    """It is for scoring the model that the run ended with after `round` rounds, which cost `spend`; none is trained."""
    noise_bands: int = 1
    """Steps that share noise. Beyond 1 the round took about so many times the steps of `spend`, at that part of its
    rate; `spend` is what it costs, for every build that reads this."""

    @property
    def spends(self) -> tuple[Spend, ...]:
        """All that this charge costs."""
        return (self.spend,) if self.evaluation is None else (self.spend, self.evaluation)


def linked(before: Entry | None, kind: str, content: Mapping[str, object], written: float) -> Entry:
    """The entry that follows `before`; None begins a chain.

    >>> first = linked(None, "opened", {"name": "a"}, 0.0)
    >>> second = linked(first, "charged", {}, 1.0)
    >>> second.number, unlinked([first, second]), unlinked([first, first])
    (2, None, 2)
    """
    number = 1 if before is None else before.number + 1
    body = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    entry = Entry(number, written, kind, body, "")
    return replace(entry, hash=_hash(_START if before is None else before.hash, entry))


def _hash(before: str, entry: Entry) -> str:
    content = json.dumps([before, entry.number, entry.written, entry.kind, entry.body])
    return hashlib.sha256(content.encode()).hexdigest()


def unlinked(entries: Sequence[Entry]) -> int | None:
    """Number of the first entry that does not follow from those before it; None for a sound chain."""
    before = _START
    for number, entry in enumerate(entries, 1):
        if entry.number != number or entry.hash != _hash(before, entry):
            return number
        before = entry.hash
    return None


def charges_of(entries: Iterable[Entry]) -> dict[int, Charge]:
    """The charges by number, in the order in which they were made.

    Raises:
        LedgerError: An entry is none that a client writes.
    """
    charges: dict[int, Charge] = {}
    for entry in entries:
        note(charges, entry)
    return charges


def note(charges: dict[int, Charge], entry: Entry) -> None:
    """Bring `charges` up to date with one more entry.

    Raises:
        LedgerError: It is none that a client writes.
    """
    try:
        if entry.kind == CHARGED:
            charges[entry.number] = _charge(entry)
        elif entry.kind == RELEASED:
            released = json.loads(entry.body)
            number = int(released["charge"])
            charges[number] = replace(charges[number], digest=str(released["digest"]))
        elif entry.kind == DROPPED:
            dropped = json.loads(entry.body)
            number = int(dropped["charge"])
            charges[number] = replace(charges[number], dropped=str(dropped["why"]))
        elif entry.kind not in {OPENED, ADOPTED}:
            raise ConfigError(f"kind {entry.kind!r} is unknown")
    except (ConfigError, ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"entry {entry.number} is none that a client writes ({error})") from error


def charge_content(
    run: str,
    round: int,
    spend: Spend,
    evaluation: Spend | None = None,
    result: bool = False,
    noise_bands: int = 1,
) -> dict[str, object]:
    """What an entry of kind `CHARGED` says."""
    more: dict[str, object] = {} if evaluation is None else {"evaluation": asdict(evaluation)}
    more |= {"noise_bands": noise_bands} if noise_bands > 1 else {}
    return {"run": run, "round": round, **asdict(spend), **more, **({"result": True} if result else {})}


def _charge(entry: Entry) -> Charge:
    body = json.loads(entry.body)
    evaluation = _spend(body["evaluation"]) if "evaluation" in body else None
    result, bands = bool(body.get("result", False)), int(body.get("noise_bands", 1))
    spend = _spend(body)
    return Charge(entry.number, body["run"], body["round"], spend, None, evaluation, result=result, noise_bands=bands)


def _spend(body: Mapping[str, Any]) -> Spend:
    return Spend(body["sampling_rate"], body["noise_multiplier"], body["steps"])


def totals(charges: Iterable[Charge]) -> Counter[tuple[float, float]]:
    """Steps by (sampling rate, noise multiplier): all that epsilon depends on."""
    steps: Counter[tuple[float, float]] = Counter()
    for charge in charges:
        for spend in charge.spends:
            steps[spend.sampling_rate, spend.noise_multiplier] += spend.steps
    return steps


def account_of(entries: Sequence[Entry]) -> tuple[str, str]:
    """Name and id of the account, from its first entry.

    Raises:
        LedgerError: The first entry does not say.
    """
    try:
        if entries[0].kind != OPENED:
            raise ValueError(f"it is of kind {entries[0].kind!r}")
        content = json.loads(entries[0].body)
        return str(content["name"]), str(content["account"])
    except (IndexError, ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"its first entry does not say whose account it is ({error})") from error
