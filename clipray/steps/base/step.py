"""What every step has in common: where it stands on disk, what a run gives it, what it shows while it works."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from clipray import tables
from clipray.errors import SchemaError, StaleTableError
from clipray.inputs.committed_rows import CommittedRows
from clipray.job import Job
from clipray.job.load import changes, fingerprint
from clipray.storage.events import Events
from clipray.storage.folder import Folder
from clipray.tables.started import read_started


@dataclass(frozen=True)
class State:
    """What is on disk: `finished`, `partial` (also: to be extended), `absent` or `stale`; `changed` says why stale.

    Attributes:
        again: rows that were rejected for a passing reason and are tried again.
    """

    kind: str
    stock: CommittedRows | None = None
    changed: tuple[str, ...] = ()
    again: int = 0


@dataclass(frozen=True)
class Snapshot:
    """Where a step stands, for a display.

    Attributes:
        total: rows that come in; written, rejected: of them, so far, earlier runs included.
        encoded: rows that went through a worker in this run (some of them not on disk yet).
        rate: rows a second over the last half minute; stages: rows a second and busy seconds by stage.
        queues: rows that wait for a stage: `decode`, `encode`, `write`.
    """

    step: str
    total: int
    written: int
    rejected: int
    encoded: int
    rate: float
    eta_s: float | None
    stages: dict[str, dict[str, float]]
    phase: str
    queues: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepContext:
    """What a step is prepared from, beside its settings.

    Attributes:
        model: gives the job's `ResolvedModel` to those that ask.
        retry: rows that were rejected for a passing reason are tried again.
    """

    job: Job
    output: Folder
    model: Callable[[], Any]
    retry: bool = True


@dataclass(frozen=True)
class RunContext:
    """What a step gets from the run: a cluster when it asks for one, and who listens."""

    cluster: Callable[[], Any]
    events: Events
    watch: Callable[[Snapshot], None]
    say: Callable[[str], None]


class Ticker:
    """Tells the display and the event log, now and then, how far a step has come."""

    def __init__(self, run: RunContext, step: str, total: int, phase: str) -> None:
        self._run, self._step, self._total, self._phase = run, step, total, phase
        self._began = self._logged = time.monotonic()

    def at(self, done: int, written: int, phase: str | None = None) -> None:
        """`done`: rows worked on in this run; `written`: rows on disk."""
        now = time.monotonic()
        rate = done / max(now - self._began, 1e-9)
        left = (self._total - done) / rate if done else None
        shot = Snapshot(self._step, self._total, written, 0, done, rate, left, {}, phase or self._phase)
        self._run.watch(shot)
        if now - self._logged >= 5:
            self._logged = now
            self._run.events.write("progress", **asdict(shot))


class Step(Protocol):
    """A step whose inputs are opened and counted: to be looked at, or run."""

    @property
    def name(self) -> str: ...

    @property
    def total(self) -> int:
        """Rows that come in."""

    @property
    def output(self) -> Folder: ...

    @property
    def table(self) -> Folder: ...

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that decide the values of a row, and what they rest on."""

    def inspect(self, *, count: bool = True) -> State:
        """Look at what is on disk without touching it; `count`: also how many rows of a partial table there are."""

    def describe(self, cluster: Any) -> list[str]:
        """Lines for `clipray plan`."""

    def run(self, run: RunContext) -> tables.Record:
        """Make what is missing, from wherever the last run ended; commit."""


def standing(table: Folder, identity: Mapping[str, Any], digest: str) -> State:
    """Compare a table on disk with what would make it now. `digest`: of the rows that come in."""
    record = tables.record_to_go_on(table)
    before = record.settings if record else (read_started(table) or {}).get("settings")
    if before is None:
        return _standing_by_shards(table, fingerprint(identity))
    if fingerprint(before) != fingerprint(identity):
        return State("stale", changed=tuple(changes(before, identity)) or ("it was written by something else",))
    if record and record.inputs.get("digest") == digest and tables.intact(table, record):
        return State("finished")
    return State("partial")


def _standing_by_shards(table: Folder, mark: str) -> State:
    """Where a table stands whose record and note are missing or damaged. mark: the fingerprint of what would make it now."""
    names = tables.shard_names(table)
    for name in names:
        with contextlib.suppress(SchemaError, FileNotFoundError):  # torn
            if tables.shard_stamp(table, name)[2].get("fingerprint") != mark:
                return State("stale", changed=("it was written by something else",))
    return State("partial" if names else "absent")


def refuse_stale(table: Folder, state: State) -> None:
    """Raises StaleTableError where the table was made with other settings."""
    if state.kind == "stale":
        raise StaleTableError(
            f"{table.url} was made with other settings: {'; '.join(state.changed)}. "
            "Set them back, give the job another `output`, or make the table anew with `--fresh`"
        )
