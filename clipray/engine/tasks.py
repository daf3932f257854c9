"""Work on many pieces in Ray tasks: small results in the order of the pieces, however they end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from clipray.engine.connect import abandoned
from clipray.engine.health import Health, answers_of, unwrapped

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 2  # tasks waiting for each that can run
TASK_CPUS = 1.0
STOP_S = 15.0  # for tasks that are under way when one fails


def map_tasks(
    work: Callable[..., Result], items: Sequence[Item], cpus: float, tick: Callable[[int], None], shared: Any = None
) -> Iterator[Result]:
    """`work(item)` in tasks of one CPU; results in the order of `items`, a bounded number under way.

    Args:
        cpus: of the cluster. tick: called about once a second with the number of finished tasks.
        shared: what all tasks need, sent to each machine once: then it is `work(item, shared)`.

    Raises:
        ClipRayError: what a task raised. RunError: workers died over and over, start no longer, or Ray died.
    """
    task: Any = ray.remote(num_cpus=TASK_CPUS, max_retries=3)(work)
    limit = max(2, int(AHEAD * cpus / TASK_CPUS))
    also = () if shared is None else (ray.put(shared),)
    running: dict[Any, int] = {}
    ready: dict[int, Any] = {}
    started = n_yielded = 0
    last, health = time.monotonic(), Health()
    try:
        while n_yielded < len(items):
            while started < len(items) and len(running) + len(ready) < limit:
                running[task.remote(items[started], *also)] = started
                started += 1
            done, _ = ray.wait(list(running), num_returns=1, timeout=0.5) if running else ([], [])
            for ref in done:
                ready[running.pop(ref)] = ray.get(ref)
            health.progressed() if done else health.look()
            if time.monotonic() - last >= 1:
                tick(n_yielded + len(ready))
                last = time.monotonic()
            while n_yielded in ready:
                yield ready.pop(n_yielded)
                n_yielded += 1
    except ray.exceptions.RayError as error:
        raise unwrapped(error) from error
    finally:
        # Not cancelled: a task that ends at that very moment makes Ray 2.60 end this process (ray-project/ray#54798).
        if running and not abandoned():
            with contextlib.suppress(ray.exceptions.RayError):
                ray.wait(list(running), num_returns=len(running), timeout=STOP_S)


@dataclass(frozen=True)
class Kept:
    """What a task made, kept in Ray's object store: the driver hands it on and never holds it."""

    ref: Any

    def read(self) -> Any:
        """The object itself, whose arrays are read-only. Raises ClipRayError: it was lost."""
        (value,) = answers_of([self.ref])
        return value


def make_and_keep(work: Callable[..., tuple[Any, Any]], *arguments: Any) -> tuple[Any, Kept]:
    """`work(*arguments)` in a task of one CPU: the first of its two results, and the second, kept.

    Raises:
        ClipRayError: what the task raised. RunError: workers or Ray died.
    """
    task: Any = ray.remote(num_cpus=TASK_CPUS, max_retries=3, num_returns=2)(work)
    first, second = task.remote(*arguments)
    (value,) = answers_of([first])
    return value, Kept(second)
