"""What a run shows and logs while a step works: how far it has come, how fast, and what waits where."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from clipray.steps.base.step import RunContext, Snapshot

if TYPE_CHECKING:  # Polars, which workers over vectors do without
    from clipray.inputs.committed_rows import CommittedRows

Result = TypeVar("Result")
LOG_S = 5.0
RATE_S = 30.0  # over which the rate of a stream is taken


class Ticker:
    """Tells the display and the event log, now and then, how far a step has come."""

    def __init__(self, run: RunContext, step: str, total: int, phase: str) -> None:
        self.phase = phase
        self._run, self._step, self._total = run, step, total
        self._began = self._logged = time.monotonic()

    def at(self, done: int, written: int, phase: str | None = None) -> None:
        """`done`: rows worked on in this run; `written`: rows on disk."""
        rate = done / max(time.monotonic() - self._began, 1e-9)
        eta_s = _eta_s(self._total - done, rate)
        self._show(Snapshot(self._step, self._total, written, 0, done, rate, eta_s, {}, phase or self.phase))

    def map_tasks(
        self, work: Callable[..., Result], items: Sequence[Any], shared: Any = None, *,
        rows: Sequence[int] = (), written: int | None = None,
    ) -> Iterator[Result]:  # fmt: skip
        """`work(item)` or `work(item, shared)` in tasks; results in the order of `items`, see `engine.tasks.map_tasks`.

        Args:
            rows: of each item; without them the display counts items.
            written: rows that were on disk before, where the tasks write theirs.
        """
        from clipray.engine.tasks import map_tasks

        done = [0, *itertools.accumulate(rows)]

        def tick(n: int) -> None:
            if rows:
                self.at(done[n], 0 if written is None else written + done[n])
            else:
                self.at(0, 0, f"{self.phase}, {n} of {len(items)}" if len(items) > 1 else None)

        return map_tasks(work, items, self._run.cluster().cpus, tick, shared)

    def _show(self, snapshot: Snapshot) -> None:
        self._run.watch(snapshot)
        if (now := time.monotonic()) - self._logged >= LOG_S:
            self._logged = now
            self._run.events.write("progress", **asdict(snapshot))


class StreamTicker(Ticker):
    """The same of rows that stream through encoders.

    Attributes:
        encoded: rows that went through them in this run.
    """

    def __init__(self, run: RunContext, step: str, total: int) -> None:
        super().__init__(run, step, total, "starting")
        self.encoded = 0
        self._logged = 0.0  # the first is logged at once
        self._history: list[tuple[float, int]] = []
        self._rows_before: dict[str, int] = {}  # by stage, when the pass began

    def begin_pass(self, board: Mapping[str, Any]) -> None:
        self._rows_before = dict(board["rows"])

    def observe(
        self, committed: CommittedRows, written: int, rejects: Mapping[str, int], board: Mapping[str, Any]
    ) -> None:
        """written, rejects: rows of this pass. board: what the workers have reported, see `Progress`."""
        self.encoded = board["rows"].get("encode", 0)
        if self.encoded and self.phase == "starting":
            self.phase = "encoding"
        rejected, rate = sum(rejects.values()), self._rate()
        left = max(0, self._total - committed.rows - committed.rejected - self.encoded)
        self._show(
            Snapshot(
                self._step,
                self._total,
                committed.rows + written,
                committed.rejected + rejected,
                self.encoded,
                rate,
                _eta_s(left, rate),
                {stage: _of_stage(rows, board["seconds"][stage]) for stage, rows in board["rows"].items()},
                self.phase,
                self._queues(board["rows"], written + rejected),
            )
        )

    def _rate(self) -> float:
        """Rows a second over the last half minute."""
        now = time.monotonic()
        history = [*self._history, (now, self.encoded)]
        self._history = [h for h in history if now - h[0] <= RATE_S and h[1]] or history[-1:]
        then, before = self._history[0]
        return (self.encoded - before) / (now - then) if now > then else 0.0

    def _queues(self, rows: Mapping[str, int], written: int) -> dict[str, int]:
        """Rows between the stages of this pass, by the stage that they wait for; a lost block waits until its end."""
        passed = {stage: count - self._rows_before.get(stage, 0) for stage, count in rows.items()}
        passed["write"] = written
        stages = [stage for stage in ("read", "decode", "encode", "write") if stage in passed]
        return {after: max(0, passed[before] - passed[after]) for before, after in itertools.pairwise(stages)}


def _of_stage(rows: int, busy_s: float) -> dict[str, float]:
    return {"rows": rows, "busy_s": round(busy_s, 1), "rows_per_busy_s": round(rows / max(1e-9, busy_s), 1)}


def _eta_s(rows: int, rate: float) -> float | None:
    return rows / rate if rate else None
