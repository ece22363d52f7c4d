"""A cap on how fast payloads move."""

import threading
import time

__all__ = ["Bucket"]


class Bucket:
    """A token bucket: bytes pass at `rate` on average, and at most one second's worth at once after a pause.

    One bucket may be used from several threads; they share its rate.
    """

    def __init__(self, rate: int | None) -> None:
        """`rate`: bytes in a second; None holds nothing back."""
        self._rate = rate
        self._lock = threading.Lock()
        self._paid = time.monotonic()

    def take(self, count: int) -> None:
        """Wait until `count` more bytes may pass."""
        if self._rate is None:
            return
        with self._lock:
            now = time.monotonic()
            # The time at which all that was taken is paid for; never more than a second behind, which is the burst.
            self._paid = max(self._paid, now - 1.0) + count / self._rate
            wait = self._paid - now
        if wait > 0:
            time.sleep(wait)
