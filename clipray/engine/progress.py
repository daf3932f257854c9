"""Progress that workers report to the driver: rows and busy seconds per stage, and facts about each worker."""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections import Counter, defaultdict
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clipray.engine.connect import abandoned


class _Sums:
    """Of what the workers of one step report."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.nodes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.workers: dict[str, dict[str, Any]] = {}
        self.fatal: str | None = None
        self.starts = 0  # of encoders, since one of them had its model or a row

    def add(self, message: dict[str, Any]) -> None:
        if "worker" in message or message.get("stage") == "encode":
            self.starts = 0
        if "stage" in message:
            stage = message["stage"]
            self.rows[stage] += message["rows"]
            self.seconds[stage] += message["seconds"]
            self.nodes[stage][message["node"]] += message["rows"]
        elif "worker" in message:
            worker = message["worker"]
            self.workers[f"{worker['host']}:{worker['pid']}"] = worker
        elif "starting" in message:
            self.starts += 1
        elif "fatal" in message:
            self.fatal = message["fatal"]


class _Board:
    """The sums of each step of a run: a process of its own, so one for all. Losing it loses a display, never a row."""

    def __init__(self) -> None:
        self._steps: dict[str, _Sums] = {}

    def add(self, step: str, message: dict[str, Any]) -> None:
        self._steps.setdefault(step, _Sums()).add(message)

    def state(self, step: str) -> dict[str, Any]:
        return vars(self._steps.setdefault(step, _Sums()))


class Reporter:
    """The workers' end: a callable that travels with them and never waits. Adds on which node it is called."""

    def __init__(self, board: Any, step: str) -> None:
        self._board, self._step = board, step

    def __call__(self, message: dict[str, Any]) -> None:
        self._board.add.remote(self._step, {**message, "node": ray.get_runtime_context().get_node_id()})


class Progress:
    """The driver's end, of one step. `known` is its last known state: to ask is to wait for the board's process."""

    def __init__(self) -> None:
        context = ray.get_runtime_context()
        self._board, self._step = _board(context.get_node_id(), context.get_job_id()), uuid.uuid4().hex
        self.reporter = Reporter(self._board, self._step)
        self.known: dict[str, Any] = vars(_Sums())

    def state(self) -> dict[str, Any]:
        """`rows` and `seconds` by stage, `nodes` (rows by stage and node), `workers`, `fatal`, `starts`; the last known state when the board is away."""
        if abandoned():
            return self.known
        with contextlib.suppress(ray.exceptions.RayError):
            self.known = ray.get(self._board.state.remote(self._step), timeout=10)
        return self.known


@functools.lru_cache(maxsize=1)
def _board(node: str, job: str) -> Any:  # noqa: ARG001
    """The board of this driver: `job` of the Ray whose `node` it stands on."""
    beside_us: Any = NodeAffinitySchedulingStrategy(node, soft=False)
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=beside_us)(_Board)
    return actor.remote()
