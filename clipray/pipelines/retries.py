"""Repeats requests that fail for a passing reason, and leaves servers that do not answer alone for a while."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from clipray.tables.reasons import Rejected, is_passing

ATTEMPTS = 3
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 8.0
SILENT_S = 60.0  # for which a server that did not answer is not asked again


class Failure(Exception):
    """A request that failed.

    Attributes:
        answered: the server answered. again: another request may succeed.
        retry_after_s: how long the server asks to wait.
    """

    def __init__(self, rejected: Rejected, *, answered: bool, again: bool = True, retry_after_s: float = 0.0) -> None:
        super().__init__(rejected.message)
        self.rejected, self.answered, self.retry_after_s = rejected, answered, retry_after_s
        self.again = again and is_passing(rejected.reason)


@dataclass
class Servers:
    """Which servers answered lately. Safe to use in several threads: each access to a dict is a single one."""

    clock: Callable[[], float] = time.monotonic
    _answered: dict[str, float] = field(default_factory=dict)
    _silent: dict[str, float] = field(default_factory=dict)

    def answered(self, server: str) -> None:
        self._answered[server] = self.clock()
        self._silent.pop(server, None)

    def did_not_answer(self, server: str) -> None:
        self._silent[server] = self.clock()

    def has_answered(self, server: str, since: float) -> bool:
        return self._answered.get(server, float("-inf")) >= since

    def is_silent(self, server: str) -> bool:
        return self.clock() - self._silent.get(server, float("-inf")) < SILENT_S


@dataclass(frozen=True)
class Retries:
    """Repeats a request with growing waits, within a time.

    Attributes:
        jitter: a share of 1, by which waits differ, so that those who failed together do not come again together.
    """

    servers: Servers = field(default_factory=Servers)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    jitter: Callable[[], float] = random.random

    def run(self, request: Callable[[float], bytes], server: str, uri: str, timeout_s: float, patience: int) -> bytes:
        """What the request brings.

        Args:
            request: gets the seconds that it may take; raises Failure.
            timeout_s: the longest that one request may take.
            patience: `patience * timeout_s` bounds all requests of a row, if the server answers at all.

        Raises:
            Rejected: why the last request failed.
        """
        began = self.clock()
        attempts = ATTEMPTS * patience
        for attempt in range(1, attempts + 1):
            if self.servers.is_silent(server):
                raise Rejected("fetch", "unreachable", f"{uri}: {server} did not answer a moment ago")
            asked = self.clock()
            try:
                data = request(min(timeout_s, began + patience * timeout_s - asked))
            except Failure as failure:
                if failure.answered:
                    self.servers.answered(server)
                answers = self.servers.has_answered(server, asked)
                deadline = began + timeout_s * (patience if answers else 1)
                wait = max(self._wait(attempt), failure.retry_after_s)
                if failure.again and attempt < attempts and self.clock() + wait < deadline:
                    self.sleep(wait)
                    continue
                if not self.servers.has_answered(server, began):
                    self.servers.did_not_answer(server)
                raise failure.rejected from failure
            self.servers.answered(server)
            return data
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, attempt: int) -> float:
        return min(FIRST_WAIT_S * 2.0 ** (attempt - 1), LONGEST_WAIT_S) * (1 + self.jitter()) / 2
