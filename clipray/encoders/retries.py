"""Requests that fail for a passing reason are made again; servers that do not answer are let alone for a while."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from clipray.encoders.refusals import Refused
from clipray.reasons import is_passing

ATTEMPTS = 5
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 8.0
SILENT_S = 60.0  # for which a server that did not answer is not asked again


class Failure(Exception):
    """A request that failed.

    Attributes:
        answered: the server said something. again: another request may succeed.
        retry_after_s: how long the server asks to wait.
    """

    def __init__(self, refused: Refused, *, answered: bool, again: bool = True, retry_after_s: float = 0.0) -> None:
        super().__init__(refused.message)
        self.refused, self.answered, self.retry_after_s = refused, answered, retry_after_s
        self.again = again and is_passing(refused.reason)


@dataclass
class Servers:
    """When servers answered last, and which do not. Safe to use in several threads."""

    clock: Callable[[], float] = time.monotonic
    _answered: dict[str, float] = field(default_factory=dict)
    _silent: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answered(self, server: str) -> None:
        with self._lock:
            self._answered[server] = self.clock()
            self._silent.pop(server, None)

    def did_not_answer(self, server: str, since: float) -> None:
        """A request made at `since` failed without an answer; the server is silent unless it answered another since."""
        with self._lock:
            if self._answered.get(server, since) <= since:
                self._silent[server] = self.clock()

    def is_silent(self, server: str) -> bool:
        with self._lock:
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
            timeout_s: the longest that one request may take; patience: how often that long all may take.

        Raises:
            Refused: why the last request failed.
        """
        began = self.clock()
        deadline = began + patience * timeout_s
        for attempt in range(ATTEMPTS * patience):
            if self.servers.is_silent(server):
                raise Refused("fetch", "unreachable", f"{uri}: {server} did not answer a moment ago")
            try:
                data = request(min(timeout_s, deadline - self.clock()))
            except Failure as failure:
                if failure.answered:
                    self.servers.answered(server)
                wait = max(self._wait(attempt), failure.retry_after_s)
                if failure.again and attempt + 1 < ATTEMPTS * patience and self.clock() + wait < deadline:
                    self.sleep(wait)
                    continue
                if not failure.answered:
                    self.servers.did_not_answer(server, began)
                raise failure.refused from failure
            self.servers.answered(server)
            return data
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, attempt: int) -> float:
        return min(FIRST_WAIT_S * 2.0**attempt, LONGEST_WAIT_S) * (1 + self.jitter()) / 2
