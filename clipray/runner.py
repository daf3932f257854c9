"""Runs the steps of a job in order: skips what is finished, refuses what is stale, goes on with the rest."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clipray import tables
from clipray.errors import JobError, RunError, Stopped
from clipray.events import Events
from clipray.job import load_job, steps_of
from clipray.settings import EmbedImages, Job
from clipray.status import StepReport, status
from clipray.storage import Folder

LOCK = ".lock"


def run(
    job: Job | str,
    *,
    fresh: Sequence[str] = (),
    retry_rejects: bool = False,
    address: str | None = None,
    watch: Callable[[Any], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> list[StepReport]:
    """Run what is not finished of a job.

    Args:
        job: a `Job`, or the path or URL of a job file.
        fresh: names of tables to delete and make anew.
        retry_rejects: forget the rejects of an earlier run and try those rows again.
        address: a Ray cluster; without it, RAY_ADDRESS, the job's `address`, or Ray on this machine.
        watch: called about every second with a `Snapshot` of the step at work.
        notice: called with one line for each thing a person should know.

    Returns:
        One report per table.

    Raises:
        ClipRayError: and what is written by then is kept; the next run goes on from there.
    """
    job = load_job(job) if isinstance(job, str) else job
    output = Folder(job.output)
    events, say = Events(output), notice or (lambda _: None)
    with _only_run(output), _signals():
        events.write("run_started", job=job.name, pid=os.getpid())
        try:
            reports = _run_steps(job, output, events, fresh, retry_rejects, address, watch or (lambda _: None), say)
        except KeyboardInterrupt:
            events.write("stopped")
            raise Stopped(_where_it_stands(output)) from None
        except Exception as error:
            events.write("run_failed", error=f"{type(error).__name__}: {error}")
            raise
        events.write("run_finished")
    return reports


def _run_steps(
    job: Job, output: Folder, events: Events, fresh: Sequence[str], retry_rejects: bool, address: str | None,
    watch: Callable[[Any], None], say: Callable[[str], None],
) -> list[StepReport]:  # fmt: skip
    settings = steps_of(job)
    _known_tables(fresh, [s.name for s in settings])
    for step in settings:
        for table in step.tables if step.name in fresh else ():
            _delete_table(output, table)
    if retry_rejects:
        for step in settings:
            _forget_rejects(output, step.name)
    with contextlib.ExitStack() as stack:
        cluster = functools.cache(lambda: stack.enter_context(_connected(address or job.address)))
        with ThreadPoolExecutor(1) as aside:
            found = aside.submit(_resolve, job)  # imports torch: seconds, in which Ray can start
            if any(tables.read_record(output.sub(s.name)) is None for s in settings):
                cluster()
            model = found.result()
        reports: list[StepReport] = []
        for s in settings:
            reports.append(_run_step(s, job, output, model, cluster, events, watch, say))
            reports += [_table_report(output, name) for name in s.tables[1:]]
        return reports


def _table_report(output: Folder, name: str) -> StepReport:
    """Of a table that a step writes beside its own."""
    record = tables.read_record(output.sub(name))
    assert record is not None
    return StepReport(name, "finished", record.rows, record.rejects, record=record)


def _run_step(
    settings: EmbedImages, job: Job, output: Folder, model: Any, cluster: Callable[[], Any], events: Events,
    watch: Callable[[Any], None], say: Callable[[str], None],
) -> StepReport:  # fmt: skip
    from clipray.engine.plan import make_plan
    from clipray.engine.progress import Progress
    from clipray.steps import embed_images as module
    from clipray.steps.attempt import Attempt

    step = module.prepare(settings, output, job.model, model)
    name, total = settings.name, step.scan.rows
    if module.inspect(step, count=False).kind == "finished":
        record = tables.read_record(step.table)
        assert record is not None
        return StepReport(
            name, "finished", record.rows, record.rejects, total, note="was finished already", record=record
        )
    refused = step.scan.rejects
    if refused.num_rows:
        example = refused["message"][0].as_py()
        say(
            f"{name}: {refused.num_rows} of {total} manifest rows have no id or a repeated one and are rejected, e.g. {example}"
        )
    here = cluster()
    plan = make_plan(settings, here.cpus, here.gpus, here.nodes)
    say(f"{name}: {plan.sentence()}")
    events.write("step_started", step=name, rows=total, plan=plan.sentence(), fingerprint=step.fingerprint)
    record = Attempt(step, plan, Progress(), events, watch).run()
    events.write(
        "step_finished",
        step=name,
        rows=record.rows,
        rejects=record.rejects_by_reason,
        seconds=record.seconds,
        rows_per_s=record.rows_per_s,
    )
    return StepReport(name, "finished", record.rows, record.rejects, total, record=record)


def _connected(address: str | None) -> Any:
    from clipray.engine.connect import connected

    return connected(address)


def _resolve(job: Job) -> Any:
    from clipray.encoders.resolve import resolve

    if any(step.looks_inside for step in steps_of(job)):
        import clipray.encoders.layers  # noqa: F401 - needs torch, which takes its time
    return resolve(job.model)


def _known_tables(names: Sequence[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise JobError(f"--fresh {name}: the job makes no such table; it makes: {', '.join(known)}")


def _delete_table(output: Folder, name: str) -> None:
    """Remove a table that clipray wrote; the record first, so that a kill in between leaves it unfinished."""
    for folder in (output.sub(name), output.sub(f"rejects/{name}")):
        for file in [tables.RECORD, *tables.shard_names(folder), "_started.json"]:
            folder.remove(file)


def _forget_rejects(output: Folder, name: str) -> None:
    table, rejects = output.sub(name), output.sub(f"rejects/{name}")
    if tables.shard_names(rejects):
        table.remove(tables.RECORD)
        rejects.remove(tables.RECORD)
        for shard in tables.shard_names(rejects):
            rejects.remove(shard)


@contextlib.contextmanager
def _only_run(output: Folder) -> Iterator[None]:
    """One run at a time per output, on a local disk; the lock ends with the process, however it ends."""
    if not output.local:
        yield
        return
    import fcntl

    Path(output.path("")).mkdir(parents=True, exist_ok=True)
    with open(output.path(LOCK), "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise RunError(
                f"{output.url}: another run is at work there (process {file.read().strip() or '?'}); wait for it or stop it"
            ) from None
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


def plan(job: Job | str, *, address: str | None = None) -> tuple[list[StepReport], list[str]]:
    """What `run` would do, without doing it: one report per step, and lines about machine and plan.

    Raises:
        ClipRayError: as `run` would, before any work.
    """
    job = load_job(job) if isinstance(job, str) else job  # before torch is imported: a typing error shows at once
    from clipray.engine.plan import make_plan
    from clipray.steps import embed_images as module

    output = Folder(job.output)
    model = _resolve(job)
    reports, lines = [], []
    cpus, gpus, nodes = _machine(address or job.address)
    for settings in steps_of(job):
        step = module.prepare(settings, output, job.model, model)
        state = module.inspect(step)
        layout = make_plan(settings, cpus, gpus, nodes)
        written, rejected = (state.stock.rows, state.stock.rejected) if state.stock else (0, 0)
        note = {
            "finished": "nothing to do",
            "absent": f"{step.scan.rows} rows to encode",
            "partial": f"{int((~state.stock.taken).sum()) if state.stock else 0} rows to encode",
            "stale": f"stale: {'; '.join(state.changed)}",
        }[state.kind]
        record = tables.read_record(step.table)
        if state.kind == "finished" and record:
            written, rejected = record.rows, record.rejects
        reports.append(
            StepReport(settings.name, state.kind, written, rejected, step.scan.rows, step.manifest.bytes, note, record)
        )
        lines.append(
            f"{settings.name}: manifest of {len(step.manifest.urls)} file(s), {step.scan.rows} rows, {step.manifest.bytes / 2**20:.1f} MiB, {step.scan.rejects.num_rows} refused"
        )
        lines.append(f"{settings.name}: {layout.sentence()}")
        lines.append(f"{settings.name}: model {model.name}, weights {model.weights[:23]}, vectors of {model.embed_dim}")
    return reports, lines


def _machine(address: str | None) -> tuple[float, float, int]:
    """CPUs, GPUs and nodes of the cluster at `address`, or of this machine without starting Ray."""
    from clipray.engine.connect import connected, local_cpus

    if address and address != "local":
        with connected(address) as cluster:
            return cluster.cpus, cluster.gpus, cluster.nodes
    import torch

    return float(max(2, local_cpus())), float(torch.cuda.device_count()), 1
