"""Where clients in threads wait for each other."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from fedloom.client.training.one_pass.passes import Sample, alike, gradients

__all__ = ["OnePass"]


@dataclass(eq=False)
class _Waiting:
    sample: Sample
    done: bool = False
    error: BaseException | None = field(default=None)


class OnePass:
    """Where trainers in several threads meet for the gradients of a step.

    Args:
        at_once: How many of them have turns at the same time.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once, self._turns = at_once, 0
        self._moved = threading.Condition()
        self._waiting: list[_Waiting] = []

    def expect(self, turns: int) -> None:
        """So many further turns will be had, each of which ends with `ended`, whatever it did."""
        with self._moved:
            self._turns += turns

    def ended(self) -> None:
        """A turn is over or will not be had: nobody waits for it."""
        with self._moved:
            self._turns -= 1
            self._moved.notify_all()

    def close(self) -> None:
        """Nobody waits for anybody from now on."""
        with self._moved:
            self._at_once = 0
            self._moved.notify_all()

    def compute(self, sample: Sample) -> None:
        """Leave the gradients of a sample with its optimizer, once all that have a turn have come here or ended it.

        Raises:
            ModelError: Memory runs out with a single example; or see `grouped`. Everybody in the pass gets it.
        """
        mine = _Waiting(sample)
        with self._moved:
            self._waiting.append(mine)
            self._moved.notify_all()
            self._moved.wait_for(lambda: mine.done or self._all_here)
            if not mine.done:
                together, self._waiting = self._waiting, []
                self._do(together)
        if mine.error is not None:
            raise mine.error

    @property
    def _all_here(self) -> bool:
        return len(self._waiting) >= min(self._at_once, self._turns)

    def _do(self, together: Sequence[_Waiting]) -> None:
        """The others wait for the lock meanwhile; they have nothing else to do."""
        error: BaseException | None = None
        try:
            for group in alike(sorted((each.sample for each in together), key=lambda each: each.client)):
                microbatch = min((each.microbatch for each in group), key=lambda each: each.size)
                microbatch.attempt(sum(len(each.indices) for each in group), partial(gradients, group))
        except BaseException as caught:  # raised again in each of their threads
            error = caught
        for each in together:
            each.done, each.error = True, error
        self._moved.notify_all()
