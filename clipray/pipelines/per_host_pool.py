"""Threads that fetch from many hosts at once, and from each only a few files at a time."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


class PerHostPool:
    """Threads for calls, at most `per_host` of a host's at the same time. A call that waits for its turn takes no thread."""

    def __init__(self, threads: int, name: str, per_host: int) -> None:
        self._threads, self._per_host = ThreadPoolExecutor(threads, name), per_host
        self._lock = threading.Lock()
        self._running = Counter[str]()
        self._waiting = defaultdict[str, deque[Callable[[], Any]]](deque)

    def submit(self, host: str | None, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Call the function when it is the host's turn; at once where there is no host."""
        if host is None:
            return self._threads.submit(function, *arguments)
        future = Future[Result]()

        def call() -> None:
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
            self._start_next(host)

        with self._lock:
            self._waiting[host].append(call)
            self._start(host)
        return future

    def _start_next(self, host: str) -> None:
        with self._lock:
            self._running[host] -= 1
            self._start(host)

    def _start(self, host: str) -> None:
        """Start the host's next call if one may run. Hosts without any are forgotten."""
        if self._waiting[host] and self._running[host] < self._per_host:
            self._running[host] += 1
            self._threads.submit(self._waiting[host].popleft())
        if not self._waiting[host]:
            del self._waiting[host]
        if not self._running[host]:
            del self._running[host]
