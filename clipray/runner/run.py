"""Runs the steps of a job in order: skips finished steps, fails at stale ones and resumes the others."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

from clipray import tables
from clipray.engine.cluster import ClusterResources
from clipray.errors import Stopped
from clipray.job import Job, Model, ModelStep, StepSettings
from clipray.job.load import load_job, steps_of
from clipray.models.resolve import resolve
from clipray.runner.fresh import delete_for_rerun
from clipray.runner.lock import interrupt_on_sigterm, only_run
from clipray.runner.status import TableStatus, status
from clipray.steps.base.step import RunContext, Snapshot, StepContext, model_of
from clipray.steps.open_step import AnyStep, check_ahead, open_step, run_step
from clipray.storage.environment import environment_errors, need_room
from clipray.storage.events import Events
from clipray.storage.folder import Folder
from clipray.tables.metrics import repair_metrics
from clipray.tables.reasons import passing

Watch = Callable[[Snapshot], None]
Say = Callable[[str], None]
ROOM_BYTES = 16 * 2**20  # of the output's disk, below which no run starts


@environment_errors()
def run_job(
    job: Job | str | os.PathLike[str],
    *,
    fresh: Sequence[str] = (),
    retry_rejects: bool = False,
    retry: bool = True,
    address: str | None = None,
    watch: Watch | None = None,
    notice: Say | None = None,
) -> list[TableStatus]:
    """Run the unfinished steps of a job.

    Args:
        job: a `Job`, or the path or URL of a job file.
        fresh: names of tables to delete and compute again, with all that the same step writes.
        retry_rejects: forget the rejects of an earlier run and try those rows again.
        retry: try rows again that are rejected for a temporary reason: at the end of the run, and those of earlier runs.
        address: a Ray cluster; without it, RAY_ADDRESS, the job's `address`, or Ray on this machine.
        watch: called about every second with a `Snapshot` of the step at work.
        notice: called with one line for each thing that a person should know.

    Returns:
        The status of each table.

    Raises:
        ClipRayError: everything written is kept, and the next run resumes from it.
    """
    job = job if isinstance(job, Job) else load_job(job)
    output = Folder(job.output)
    say = notice or (lambda _: None)
    events = Events(output, say)
    with only_run(output, say), interrupt_on_sigterm():
        if output.local:
            need_room(output.path(""), "the output", ROOM_BYTES)
        events.begin("run_started", job=job.name, pid=os.getpid())
        try:
            with environment_errors():
                delete_for_rerun(job, output, fresh, retry_rejects)
                statuses = _run_steps(job, events, retry, address, watch or (lambda _: None), say)
        except KeyboardInterrupt:
            events.write("stopped")
            raise Stopped(_where_it_stands(output)) from None
        except Exception as error:
            events.write("run_failed", error=f"{type(error).__name__}: {error}")
            raise
        events.write("run_finished")
    return statuses


def _run_steps(job: Job, events: Events, retry: bool, address: str | None, watch: Watch, say: Say) -> list[TableStatus]:
    output, steps = Folder(job.output), steps_of(job)
    repair_metrics(output)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as aside:
        connect = functools.cache(lambda: stack.enter_context(_connected(address or job.address, say, ahead)))
        models = {model: aside.submit(resolve, model) for model in models_of(job, steps)}

        def cluster() -> ClusterResources:
            return _as_it_is(connect())

        context = StepContext(job, output, lambda model: models[model].result(), retry, cluster, say)
        unfinished = [s for s in steps if _is_unfinished(output.sub(s.primary_table), retry)]
        ahead = imported_ahead(job, unfinished or steps)
        if any(s.needs_architecture for s in unfinished):
            aside.submit(importlib.import_module, "clipray.models.layers")  # and torch: seconds, in which Ray starts
        if any(s.needs_cluster for s in unfinished):
            connect()
        for s in unfinished:
            check_ahead(s, context)
        metered = _metered(watch, job.name, lambda: connect.cache_info().currsize > 0)
        run = RunContext(cluster, events, metered, say)
        return [table for s in steps for table in _finish_step(open_step(s, context), run, s.tables)]


def _is_unfinished(table: Folder, retry: bool) -> bool:
    """Whether there is work to do, by the table's record alone."""
    record = tables.record_to_go_on(table)
    return record is None or (retry and passing(record.rejects_by_reason) > 0)


def _finish_step(step: AnyStep, run: RunContext, names: Sequence[str]) -> Iterator[TableStatus]:
    """Run the step unless it is finished; the status of each table that it writes, `names`, its own first."""
    note = ""
    if step.caveat:
        run.say(f"{step.name}: {step.caveat}")
    if step.inspect(count=False).status == "finished":
        note = "was finished already"
        step.note_recount()
    else:
        record = run_step(step, run)
        figures = {"rows": record.rows, "rejects": record.rejects_by_reason, "seconds": record.seconds}
        run.events.write("step_finished", step=step.name, **figures, rows_per_s=record.rows_per_s)
    for name in names:
        folder = step.output.sub(name)
        done = tables.read_record(folder)
        assert done is not None
        total = step.total if folder.url == step.table.url else None
        yield TableStatus(name, "finished", done.rows, done.rejects, total, note=note, record=done, page=step.page)


def imported_ahead(job: Job, steps: Sequence[StepSettings]) -> tuple[str, ...]:
    """What the workers of these steps are to have imported. Without torch it takes longer ahead than in each of them."""
    from clipray.engine.fork_server import MODELS, VECTORS

    if models_of(job, steps):
        return *MODELS, *VECTORS
    return VECTORS if any(s.uses_torch for s in steps) else ()


def _connected(address: str | None, say: Say, ahead: Sequence[str]) -> AbstractContextManager[ClusterResources]:
    from clipray.engine.connect import connected

    return connected(address, say, ahead=ahead)


def _as_it_is(cluster: ClusterResources) -> ClusterResources:
    """The cluster as it is now: nodes may have joined or left."""
    from clipray.engine.connect import cluster_now

    return cluster_now(local=cluster.local)


def _metered(watch: Watch, run: str, connected: Callable[[], bool]) -> Watch:
    """`watch` that also publishes Ray metrics, in a run that uses Ray."""

    @functools.cache
    def meters() -> Watch:
        from clipray.engine.prometheus import Meters

        return Meters(run)

    def both(shot: Snapshot) -> None:
        if connected():
            meters()(shot)
        watch(shot)

    return both


def models_of(job: Job, steps: Sequence[StepSettings]) -> list[Model]:
    """The different models of a job's steps, in their order."""
    return list(dict.fromkeys(model_of(step, job) for step in steps if isinstance(step, ModelStep)))


def _where_it_stands(output: Folder) -> str:
    done = ", ".join(f"{r.rows} rows of {r.name}" for r in status(output.url)) or "nothing"
    return f"stopped; on disk: {done}. The same `clipray run` goes on from there"
