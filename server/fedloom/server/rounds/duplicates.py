"""Two processes that call themselves by one name, told from one that connects anew.

Who connects anew never comes back by its old connection. Two that take turns under one name do, both of them.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from fedloom.core.limits import MAX_CLIENTS

__all__ = ["Doubles"]

_REMEMBERED = 16


@dataclass
class _Name:
    now: str
    replaced: "OrderedDict[str, None]" = field(default_factory=OrderedDict)
    returned: set[str] = field(default_factory=set)
    told: bool = False


class Doubles:
    """The connections by which each name was heard."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, _Name] = OrderedDict()

    def heard(self, name: str, peer: str) -> tuple[str, str] | None:
        """Take in one message; the two peers that share the name, once, when there are two.

        Args:
            name: Who it says it is.
            peer: The other end of its connection, as gRPC names it.
        """
        known = self._names.setdefault(name, _Name(peer))
        if len(self._names) > MAX_CLIENTS:  # names that nobody has joined under cost a stranger nothing
            self._names.popitem(last=False)
        if known.now == peer or known.told:
            return None
        if peer in known.replaced:
            known.returned.add(peer)
        known.replaced[known.now] = None
        if len(known.replaced) > _REMEMBERED:
            known.returned.discard(known.replaced.popitem(last=False)[0])
        before, known.now = known.now, peer
        if len(known.returned) < 2:
            return None
        known.told = True
        return before, peer
