"""What workers tell the driver while they work: rows and busy seconds per stage, facts about themselves."""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class _Board:
    """Sums of what the workers report. Losing it loses a display, never a row."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.nodes: dict[str, dict[str, int]] = {}
        self.workers: dict[str, dict[str, Any]] = {}
        self.fatal: str | None = None

    def add(self, message: dict[str, Any]) -> None:
        if "stage" in message:
            stage = message["stage"]
            self.rows[stage] = self.rows.get(stage, 0) + message["rows"]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + message["seconds"]
            here = self.nodes.setdefault(stage, {})
            here[message["node"]] = here.get(message["node"], 0) + message["rows"]
        elif "worker" in message:
            worker = message["worker"]
            self.workers[f"{worker['host']}:{worker['pid']}"] = worker
        elif "fatal" in message:
            self.fatal = message["fatal"]

    def state(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "seconds": self.seconds,
            "nodes": self.nodes,
            "workers": self.workers,
            "fatal": self.fatal,
        }


class Reporter:
    """The workers' end: a callable that travels with them and never waits. Adds on which node it is called."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def __call__(self, message: dict[str, Any]) -> None:
        self._board.add.remote({**message, "node": ray.get_runtime_context().get_node_id()})


class Progress:
    """The driver's end."""

    def __init__(self) -> None:
        beside_us: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=beside_us)(_Board)
        self._board = actor.remote()
        self.reporter = Reporter(self._board)
        self._last: dict[str, Any] = {"rows": {}, "seconds": {}, "nodes": {}, "workers": {}, "fatal": None}

    def state(self) -> dict[str, Any]:
        """`rows` and `seconds` by stage, `nodes` (rows by stage and node), `workers`, `fatal`; the last known state when the board is away."""
        with contextlib.suppress(ray.exceptions.RayError):
            self._last = ray.get(self._board.state.remote(), timeout=10)
        return self._last
