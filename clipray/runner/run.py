"""Runs the steps of a job in order: skips what is finished, refuses what is stale, goes on with the rest."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clipray import tables
from clipray.errors import JobError, RunError, SchemaError, Stopped
from clipray.job import Job
from clipray.job.load import load_job, steps_of
from clipray.report.run_tables import finished_tables
from clipray.runner.status import StepReport, status
from clipray.steps.base.step import RunContext, State, Step, StepContext
from clipray.steps.open_step import check, prepare
from clipray.storage.environment import environment_errors, need_room
from clipray.storage.events import Events, read_events
from clipray.storage.folder import Folder, absolute
from clipray.tables.metrics import repair_metrics
from clipray.tables.reasons import passing
from clipray.tables.started import STARTED

LOCK = ".lock"
ROOM_BYTES = 16 * 2**20  # of the output's disk, below which no run starts


@environment_errors()
def run_job(
    job: Job | str | os.PathLike[str],
    *,
    fresh: Sequence[str] = (),
    retry_rejects: bool = False,
    retry: bool = True,
    address: str | None = None,
    watch: Callable[[Any], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> list[StepReport]:
    """Run what is not finished of a job.

    Args:
        job: a `Job`, or the path or URL of a job file.
        fresh: names of tables to delete and make anew, with those that the same step writes beside them.
        retry_rejects: forget the rejects of an earlier run and try those rows again.
        retry: try rows again that are rejected for a passing reason: at the end of the run, and those of earlier runs.
        address: a Ray cluster; without it, RAY_ADDRESS, the job's `address`, or Ray on this machine.
        watch: called about every second with a `Snapshot` of the step at work.
        notice: called with one line for each thing a person should know.

    Returns:
        One report per table.

    Raises:
        ClipRayError: and what is written by then is kept; the next run goes on from there.
    """
    job = job if isinstance(job, Job) else load_job(job)
    output = Folder(job.output)
    say = notice or (lambda _: None)
    events = Events(output, say)
    with _only_run(output, say), _signals():
        if output.local:
            need_room(output.path(""), "the output", ROOM_BYTES)
        events.begin("run_started", job=job.name, pid=os.getpid())
        try:
            with environment_errors():
                _make_undone(job, output, fresh, retry_rejects)
                reports = _run_steps(job, output, events, retry, address, watch or (lambda _: None), say)
        except KeyboardInterrupt:
            events.write("stopped")
            raise Stopped(_where_it_stands(output)) from None
        except Exception as error:
            events.write("run_failed", error=f"{type(error).__name__}: {error}")
            raise
        events.write("run_finished")
    return reports


def _run_steps(
    job: Job, output: Folder, events: Events, retry: bool, address: str | None,
    watch: Callable[[Any], None], say: Callable[[str], None],
) -> list[StepReport]:  # fmt: skip
    settings = steps_of(job)
    repair_metrics(output)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as aside:
        connect = functools.cache(lambda: stack.enter_context(_connected(address or job.address, say)))
        model = aside.submit(_resolve, job)
        unfinished = [s for s in settings if _is_unfinished(output.sub(s.primary_table), retry)]
        if any(s.needs_architecture for s in unfinished):
            aside.submit(importlib.import_module, "clipray.models.layers")  # and torch: seconds, in which Ray starts
        if any(s.needs_cluster for s in unfinished):
            connect()
        for s in unfinished:
            check(s, model.result)
        metered = _metered(watch, job.name, lambda: connect.cache_info().currsize > 0)
        here = RunContext(lambda: _as_it_is(connect()), events, metered, say)
        given = StepContext(job, output, model.result, retry)
        return [report for s in settings for report in _run_step(prepare(s, given), here, s.tables)]


def _make_undone(job: Job, output: Folder, fresh: Sequence[str], retry_rejects: bool) -> None:
    """Delete what is to be made anew."""
    settings = steps_of(job)
    _known_tables(fresh, [table for s in settings for table in s.tables])
    for step in settings:
        for table in step.tables if set(fresh) & set(step.tables) else ():
            _delete_table(output, table)
    if retry_rejects:
        for step in settings:
            _forget_rejects(output, step.primary_table)


def _is_unfinished(table: Folder, retry: bool) -> bool:
    """Whether there is work to do, as far as the table's record says."""
    record = tables.record_to_go_on(table)
    return record is None or (retry and passing(record.rejects_by_reason) > 0)


def _run_step(step: Step, run: RunContext, names: Sequence[str]) -> Iterator[StepReport]:
    """Run the step unless it is finished; a report for each table that it writes, `names`, its own first."""
    note = ""
    if caveat := getattr(step, "caveat", ""):
        run.say(f"{step.name}: {caveat}")
    if step.inspect(count=False).kind == "finished":
        note = "was finished already"
    else:
        record = step.run(run)
        run.events.write(
            "step_finished",
            step=step.name,
            rows=record.rows,
            rejects=record.rejects_by_reason,
            seconds=record.seconds,
            rows_per_s=record.rows_per_s,
        )
    page = str(getattr(step, "page", ""))
    for name in names:
        folder = step.output.sub(name)
        found = tables.read_record(folder)
        assert found is not None
        total = step.total if folder.url == step.table.url else None
        yield StepReport(name, "finished", found.rows, found.rejects, total, note=note, record=found, page=page)


@environment_errors()
def write_report(url: str | os.PathLike[str], *, title: str | None = None, **options: Any) -> str:
    """Make a page of all finished tables of the run at `url`, as a step `report` at the end of its job would.

    Args:
        title: by default the name of the job that ran there last.
        options: `watch` and `notice`, as of `run`.

    Returns:
        The page's path or URL.

    Raises:
        ClipRayError: there is no run, or one of its tables is not whole.
    """
    output = Folder(absolute(os.fspath(url)))
    status(output.url)
    names = finished_tables(output)
    if not names:
        raise JobError(f"{url}: no finished table there to make a page of; finish one with `clipray run`")
    ran = [str(e["job"]) for e in read_events(output) if e["event"] == "run_started" and e.get("job")]
    job = Job(name=ran[-1] if ran else os.path.basename(output.url), output=output.url,
              steps=[{"report": {"of": names, "title": title}}])  # fmt: skip
    return run_job(job, **options)[0].page


def _connected(address: str | None, say: Callable[[str], None]) -> Any:
    from clipray.engine.connect import connected

    return connected(address, say)


def _as_it_is(cluster: Any) -> Any:
    """The cluster now: nodes may have come and gone since it was joined."""
    from clipray.engine.connect import look_again

    return look_again(cluster)


def _metered(watch: Callable[[Any], None], run: str, connected: Callable[[], bool]) -> Callable[[Any], None]:
    """`watch`, and Ray's metrics beside it, in a run that uses Ray."""

    @functools.cache
    def meters() -> Callable[[Any], None]:
        from clipray.engine.prometheus import Meters

        return Meters(run)

    def seen(shot: Any) -> None:
        if connected():
            meters()(shot)
        watch(shot)

    return seen


def _resolve(job: Job) -> Any:
    """The job's model, found; None for a job without one."""
    if job.model is None:
        return None
    from clipray.models.resolve import resolve

    return resolve(job.model)


def _known_tables(names: Sequence[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise JobError(f"--fresh {name}: the job makes no such table; it makes: {', '.join(known)}")


def _delete_table(output: Folder, name: str) -> None:
    """Remove a table that clipray wrote; the record first, so that a kill in between leaves it unfinished."""
    for folder in (output.sub(name), output.sub(f"rejects/{name}")):
        names = tables.shard_names(folder)
        folder.remove(tables.RECORD)
        tables.remove_own(folder, names)
        for file in (STARTED, tables.DAMAGED):
            folder.remove(file)


def _forget_rejects(output: Folder, name: str) -> None:
    table, rejects = output.sub(name), output.sub(f"rejects/{name}")
    if tables.shard_names(rejects):
        table.remove(tables.RECORD)
        rejects.remove(tables.RECORD)
        tables.remove_own(rejects, tables.shard_names(rejects), "rejects")


@contextlib.contextmanager
def _only_run(output: Folder, say: Callable[[str], None]) -> Iterator[None]:
    """One run at a time per output, on a local disk; the lock ends with the process, however it ends."""
    if not output.local:
        yield
        return
    import fcntl

    Path(output.path("")).mkdir(parents=True, exist_ok=True)
    with open(output.path(LOCK), "a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(
                f"{output.url}: another run is at work there (process {file.read().strip() or '?'}); wait for it or stop it"
            ) from None
        except OSError as error:  # a file system without locks
            say(f"{output.url}: cannot be locked ({error.strerror}); see that no other run writes there")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM stops as cleanly as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _where_it_stands(output: Folder) -> str:
    done = ", ".join(f"{r.rows} rows of {r.name}" for r in status(output.url)) or "nothing"
    return f"stopped; on disk: {done}. The same `clipray run` goes on from there"


@environment_errors()
def plan_job(job: Job | str | os.PathLike[str], *, address: str | None = None) -> tuple[list[StepReport], list[str]]:
    """What `run` would do, without doing it: one report per step, and lines about machine and plan.

    Raises:
        ClipRayError: as `run` would, before any work.
    """
    job = job if isinstance(job, Job) else load_job(job)  # before anything heavy: a typing error shows at once
    output = Folder(job.output)
    given = StepContext(job, output, functools.cache(lambda: _resolve(job)))
    here = _machine(address or job.address)
    reports: list[StepReport] = []
    lines: list[str] = [] if here.local else [f"cluster: {here}"]
    made: set[str] = set()  # tables that this very run would make first
    for settings in steps_of(job):
        try:
            step = prepare(settings, given)
        except SchemaError as error:
            awaited = [name for name in settings.sources if name in made]
            if not awaited:
                raise
            reports.append(StepReport(settings.name, "absent", note=f"waits for {', '.join(awaited)}"))
            lines.append(f"{settings.name}: {error}")
            made.update(settings.tables)
            continue
        state = step.inspect()
        if state.kind != "finished":
            made.update(settings.tables)
        reports.append(_planned(step, state))
        lines += step.describe(here)
    return reports, lines


def _planned(step: Step, state: State) -> StepReport:
    record = tables.read_record(step.table) if state.kind == "finished" else None
    stock = state.stock
    left = int((~stock.taken).sum()) if stock else step.total
    note = {
        "finished": "nothing to do",
        "absent": f"{step.total} rows to do",
        "partial": _left(left, state.again),
        "stale": f"stale: {'; '.join(state.changed)}",
    }[state.kind]
    found = record or stock
    written, rejected = (
        (found.rows, found.rejects if isinstance(found, tables.Record) else found.rejected) if found else (0, 0)
    )
    return StepReport(step.name, state.kind, written, rejected, step.total, note=note, record=record)


def _left(rows: int, again: int) -> str:
    retried = f"{again} rows rejected for a passing reason are tried again"
    return (f"{rows} rows to do; {retried}" if rows else retried) if again else f"{rows} rows to do"


def _machine(address: str | None) -> Any:
    """What the cluster at `address` has, or this machine, without starting Ray on it."""
    from clipray.engine.cluster import ClusterResources, Node
    from clipray.engine.connect import connected, local_cpus

    if address and address != "local":
        with connected(address) as cluster:
            return cluster
    import torch

    return ClusterResources((Node(float(max(2, local_cpus())), float(torch.cuda.device_count())),), local=True)
