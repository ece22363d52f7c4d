"""What a strategy raises, told apart from what this package does: it is code that others write."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from fedloom.core.errors import FedloomError, SchemaError, StoreError, StrategyError, UpdateRejected
from fedloom.core.schema import Array
from fedloom.strategies.api import State, Strategy, Update

__all__ = ["blamed", "check_update"]

_log = logging.getLogger(__name__)


@contextmanager
def blamed(name: str, doing: str, *refusals: type[FedloomError]) -> Iterator[None]:
    """Whatever goes wrong in the block is the strategy's, but for the disk and the memory of this machine.

    Args:
        name: The strategy, as the run file names it.
        doing: The method that is called, and for whom.
        refusals: What it may raise on purpose there.

    Raises:
        StrategyError: Naming the strategy, the method, and the error as its own code raised it.
    """
    passed: tuple[type[Exception], ...] = (StoreError, StrategyError, MemoryError, *refusals)
    try:
        yield
    except passed:
        raise
    except Exception as error:
        _log.exception("strategy %r fails in %s", name, doing)
        said = str(error) if isinstance(error, FedloomError) else f"{type(error).__name__}: {error}"
        raise StrategyError(
            f"strategy {name!r} fails in {doing}: {said}. What is committed stays; correct the strategy or its "
            "options, and start again with the same state directory"
        ) from error


def check_update(name: str, strategy: Strategy, state: State, update: Update) -> None:
    """Let a strategy refuse an update before it counts.

    Raises:
        UpdateRejected: The strategy refuses it.
        StrategyError: The strategy fails on it; the tensor it looked at last is named.
    """
    watched = _Watched(update.delta)
    try:
        strategy.check(state, replace(update, delta=watched))
    except (SchemaError, UpdateRejected) as error:
        raise UpdateRejected(str(error)) from error
    except (StoreError, MemoryError):
        raise
    except Exception as error:
        where = f" at {watched.last!r}" if watched.last else ""
        with blamed(name, f"check, on the update of client {update.client!r}{where}"):
            raise error


class _Watched(Mapping[str, Array]):
    """Tensors that remember which of them was looked at last."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self._tensors, self.last = tensors, ""

    def __getitem__(self, name: str) -> Array:
        self.last = name
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        for name in self._tensors:
            self.last = name
            yield name

    def __len__(self) -> int:
        return len(self._tensors)
