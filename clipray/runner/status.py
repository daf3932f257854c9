"""`clipray status`: the state of a run from its files alone, without Ray or a model."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from clipray import tables
from clipray.errors import JobError
from clipray.storage.environment import environment_errors
from clipray.storage.events import read_events
from clipray.storage.folder import Folder, absolute
from clipray.tables.started import read_started, wrong_fields


@dataclass(frozen=True)
class TableStatus:
    """The state of a table, for `plan`, `status` and the end of a run.

    Attributes:
        state: `finished`, `partial`, `absent`, `stale`, or `damaged`: its files are not those that were written.
        rows, rejected: on disk; total: in the manifest (None where only the run's folder was looked at).
        note: what would run, or which settings changed.
        page: path or URL of the page that the step made, if it makes one.
    """

    name: str
    state: str
    rows: int = 0
    rejected: int = 0
    total: int | None = None
    bytes: int = 0
    note: str = ""
    record: tables.Record | None = None
    page: str = ""


@environment_errors()
def status(url: str | os.PathLike[str]) -> list[TableStatus]:
    """The tables in a run's folder, finished or not, from the files alone.

    Raises:
        JobError: there is no run.
    """
    output = Folder(absolute(os.fspath(url)))
    statuses = []
    for name in output.folders():
        folder = output.sub(name)
        record = tables.record_to_go_on(folder)
        damaged = tables.is_broken(folder)
        if record is None and read_started(folder) is None and not damaged:
            continue
        state = "damaged" if damaged else "finished" if record else "partial"
        rows = record.rows if record else _rows_on_disk(folder)
        rejected = record.rejects if record else _rows_on_disk(tables.rejects_of(output, name))
        progress = {} if record else _last_progress(output, name)
        total = record.inputs.get("rows") if record else progress.get("total")
        note = "`clipray run` repairs it" if damaged else _note(record, progress)
        size = sum(folder.sizes().values())
        statuses.append(TableStatus(name, state, rows, rejected, total, size, note, record))
    if not statuses:
        raise JobError(f"{url}: no run there: expected the `output` folder of a job that was started")
    return statuses


def _rows_on_disk(folder: Folder) -> int:
    rows = 0
    for name in tables.shard_names(folder):
        with contextlib.suppress(Exception):  # torn or just being replaced: the next run repairs it
            rows += tables.shard_footer(folder, name)[0]
    return rows


def _last_progress(output: Folder, step: str) -> dict[str, Any]:
    """The last event of a step's progress; {} where there is none."""
    fields = {"total": int, "rate": float}
    events = [e for e in read_events(output) if e["event"] == "progress" and e.get("step") == step]
    return next((e for e in reversed(events) if fields.keys() <= e.keys() and not wrong_fields(e, fields)), {})


def _note(record: tables.Record | None, progress: dict[str, Any]) -> str:
    if record is not None:
        return f"finished {record.finished_at}" + (f", {record.rows_per_s:g} rows/s" if record.rows_per_s else "")
    if progress:
        with contextlib.suppress(ValueError):
            ago = time.time() - datetime.fromisoformat(progress["time"]).timestamp()
            return f"last seen {ago:.0f} s ago at {progress['rate']:.1f} rows/s"
    return "started"
