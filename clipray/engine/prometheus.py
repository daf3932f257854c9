"""Metrics that a run publishes to Prometheus through Ray: rows, rejects, rates and queues of the step at work."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Gauge

FIGURES = {
    "rows": ("total", "Rows that come in."),
    "rows_written": ("written", "Rows on disk, earlier runs included."),
    "rows_rejected": ("rejected", "Rows rejected, earlier runs included."),
    "rows_done": ("encoded", "Rows that went through a worker in this run."),
    "rows_per_second": ("rate", "Rows a second over the last half minute."),
}
"""Name of the metric, after `clipray_` -> attribute of a snapshot, what it is."""


class Meters:
    """Takes the snapshots of steps. Ray's metrics agent on each node publishes the last values, prefixed with `ray_`."""

    def __init__(self, run: str) -> None:
        keys = ("run", "step")
        self._run = run
        self._gauges = {
            attribute: Gauge(f"clipray_{name}", text, tag_keys=keys) for name, (attribute, text) in FIGURES.items()
        }
        self._queues = Gauge(
            "clipray_queue_rows", "Rows between two stages, by the stage that they wait for.", tag_keys=(*keys, "stage")
        )

    def __call__(self, shot: Any) -> None:
        """Publish a `Snapshot`."""
        tags = {"run": self._run, "step": shot.step}
        for attribute, gauge in self._gauges.items():
            gauge.set(getattr(shot, attribute), tags=tags)
        for stage, rows in shot.queues.items():
            self._queues.set(rows, tags={**tags, "stage": stage})
