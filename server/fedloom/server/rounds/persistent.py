"""A mapping whose changes cost what they change, not what it holds, and of which every version stays as it was."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

__all__ = ["PersistentMap"]

V = TypeVar("V")

_GONE: Any = object()
_SLACK = 16


class PersistentMap(Mapping[str, V]):
    """An immutable mapping in the order of its last changes; `put` and `drop` give the next version.

    The versions share one log of changes, of which each sees a prefix (after Driscoll et al., Making data structures
    persistent, 1989). The next version of the newest one is an append, O(1) amortised; the next version of an older one
    copies what that holds. Any thread may read any version while another makes new ones, which one thread at a time
    may do.

    >>> first = PersistentMap({"ann": 1})
    >>> second = first.put("ben", 2).drop("ann")
    >>> dict(first), dict(second)
    ({'ann': 1}, {'ben': 2})
    """

    __slots__ = ("_changed", "_end", "_newest", "_size")

    def __init__(self, items: Mapping[str, V] | Iterable[tuple[str, V]] = ()) -> None:
        held = dict(items)
        self._changed = list(held)
        # Per key its newest change: which it was of all, the value, and the change of this key before.
        self._newest: dict[str, Any] = {key: (index, held[key], None) for index, key in enumerate(held)}
        self._end = self._size = len(held)

    def __getitem__(self, key: str) -> V:
        """The value of a key.

        Raises:
            KeyError: The mapping does not hold it.
        """
        value: V = self.get(key, _GONE)
        if value is _GONE:
            raise KeyError(key)
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default."""
        change = self._newest.get(key)
        while change is not None and change[0] >= self._end:
            change = change[2]
        return default if change is None or change[1] is _GONE else change[1]

    def __contains__(self, key: object) -> bool:
        """Whether the mapping holds a key."""
        return self.get(key, _GONE) is not _GONE  # type: ignore[arg-type]  # nothing but a str is found

    def __iter__(self) -> Iterator[str]:
        """The keys, the one that was changed last at the end."""
        for index in range(self._end):
            key = self._changed[index]
            change = self._newest[key]
            while change[0] >= self._end:
                change = change[2]
            if change[0] == index and change[1] is not _GONE:
                yield key

    def __len__(self) -> int:
        """How many keys the mapping holds."""
        return self._size

    def __repr__(self) -> str:
        """As a dict is shown."""
        return f"PersistentMap({dict(self)!r})"

    def put(self, key: str, value: V) -> "PersistentMap[V]":
        """The mapping with this value for the key."""
        return self._next(key, value, self._size + (self.get(key, _GONE) is _GONE))

    def drop(self, key: str) -> "PersistentMap[V]":
        """The mapping without the key, which it need not hold."""
        return self if self.get(key, _GONE) is _GONE else self._next(key, _GONE, self._size - 1)

    def _next(self, key: str, value: V, size: int) -> "PersistentMap[V]":
        copied = self._end != len(self._changed) or self._end > 2 * self._size + _SLACK
        before = PersistentMap(self) if copied else self
        after: PersistentMap[V] = object.__new__(PersistentMap)
        after._changed, after._newest = before._changed, before._newest
        after._end, after._size = before._end + 1, size
        # The key first: whoever reads an older version may look for a change in vain, never for a key.
        after._changed.append(key)
        after._newest[key] = before._end, value, after._newest.get(key)
        return after
