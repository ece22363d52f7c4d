"""Who is known in this epoch and who of them is live. No call here costs more when there are more clients.

Not safe for several threads; the coordinator holds its lock around every call.
"""

from collections import OrderedDict
from collections.abc import Iterable, Set
from dataclasses import dataclass

__all__ = ["Member", "Members"]


@dataclass
class Member:
    """One client as this process has seen it; nothing of it outlives the process."""

    asked: bool = False
    """It has asked for work, and has not left since."""
    joined: bool = False
    """It has joined in this epoch."""
    declared_examples: int = 0
    served: bool = False
    """It needs nothing more: it has fetched the final adapter, or left."""
    seen_s: float = 0.0
    """Its last sign of life, by the coordinator's clock."""


class Members:
    """The clients of one run, by name.

    Args:
        lease_s: Seconds after its last sign of life at which a client counts as gone.
        awaited: Who took part before a restart; each has one lease to come back, for more rounds or for the final
            adapter.
        now_s: The coordinator's clock.

    Attributes:
        changes: Grows whenever somebody becomes live or stops to be; equal numbers mean the same `live`.
        gone: Who stopped to be live since the owner emptied it, and is not live again.
    """

    def __init__(self, lease_s: float, awaited: Iterable[str], now_s: float) -> None:
        self.changes, self.gone = 0, set[str]()
        self._lease_s = lease_s
        self._known: dict[str, Member] = {}
        self._seen_s: OrderedDict[str, float] = OrderedDict()  # in the order of the last sign of life
        self._live: set[str] = set()
        for name in awaited:
            self._known[name] = Member(asked=True)
            self.seen(name, now_s)

    def __len__(self) -> int:
        """Clients known in this epoch."""
        return len(self._known)

    def __contains__(self, name: str) -> bool:
        """Whether the client is known."""
        return name in self._known

    def __getitem__(self, name: str) -> Member:
        """What is known of a client.

        Raises:
            KeyError: Nothing is.
        """
        return self._known[name]

    @property
    def over(self) -> bool:
        """Whether somebody has been served, and everybody who is live."""
        return any(each.served for each in self._known.values()) and all(
            self._known[name].served for name in self._live
        )

    def live(self, now_s: float) -> Set[str]:
        """Clients that have asked for work and whose lease has not lapsed; a view, which later calls change."""
        while self._seen_s:
            name, seen_s = next(iter(self._seen_s.items()))
            if now_s - seen_s <= self._lease_s:
                break
            del self._seen_s[name]
            self._set_live(name, False)
        return self._live

    def seen_ago(self, now_s: float) -> dict[str, float]:
        """Seconds since each known client's last sign of life."""
        return {name: now_s - member.seen_s for name, member in self._known.items()}

    def join(self, name: str, declared_examples: int, now_s: float) -> bool:
        """Make a client known and note what it declares; whether it had not joined in this epoch before."""
        member = self._known.setdefault(name, Member())
        first = not member.joined
        member.joined, member.declared_examples = True, declared_examples
        self.seen(name, now_s)
        return first

    def seen(self, name: str, now_s: float) -> None:
        """A sign of life: the lease of a known client begins anew."""
        self._known[name].seen_s = self._seen_s[name] = now_s
        self._seen_s.move_to_end(name)
        self._set_live(name, self._known[name].asked)

    def asks(self, name: str) -> None:
        """A known client that was just seen asks for work."""
        self._known[name].asked = True
        self._set_live(name, True)

    def leaves(self, name: str) -> None:
        """A known client is not to be waited for."""
        member = self._known[name]
        member.asked, member.served = False, True
        self._set_live(name, False)

    def _set_live(self, name: str, live: bool) -> None:
        if live != (name in self._live):
            (self._live.add if live else self._live.remove)(name)
            (self.gone.discard if live else self.gone.add)(name)
            self.changes += 1
