"""Bytes that threads share, so that no number of them holds more at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Budget:
    """So many bytes. Who needs more than there are in all gets them when nobody else holds any."""

    def __init__(self, total: int) -> None:
        self._total, self._taken = total, 0
        self._changed = threading.Condition()

    @property
    def taken(self) -> int:
        return self._taken

    def take(self, size: int) -> None:
        """Wait until `size` bytes are free, and hold them."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + size <= self._total)
            self._taken += size

    def give(self, size: int) -> None:
        with self._changed:
            self._taken -= size
            self._changed.notify_all()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Hold `size` bytes for as long as the block runs. A thread must not hold twice: it could wait for itself."""
        self.take(size)
        try:
            yield
        finally:
            self.give(size)
