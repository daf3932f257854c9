"""`clipray plan`: what a run would do, without doing it."""

from __future__ import annotations

import functools
import os

from clipray import tables
from clipray.engine.cluster import ClusterResources, Node
from clipray.errors import SchemaError
from clipray.job import Job
from clipray.job.load import load_job, steps_of
from clipray.models.resolve import resolve
from clipray.runner.status import TableStatus
from clipray.steps.base.step import State, StepContext
from clipray.steps.open_step import AnyStep, open_step
from clipray.storage.environment import environment_errors
from clipray.storage.folder import Folder


@environment_errors()
def plan_job(job: Job | str | os.PathLike[str], *, address: str | None = None) -> tuple[list[TableStatus], list[str]]:
    """What `run` would do, without doing it: the status of each step's table, and lines about machine and plan.

    Raises:
        ClipRayError: as `run` would, before any work.
    """
    job = job if isinstance(job, Job) else load_job(job)  # before anything heavy: a typing error shows at once
    output = Folder(job.output)
    context = StepContext(job, output, functools.cache(resolve))
    cluster = _resources(address or job.address)
    statuses: list[TableStatus] = []
    lines: list[str] = [] if cluster.local else [f"cluster: {cluster}"]
    unfinished: set[str] = set()  # tables that this very run would make first
    for settings in steps_of(job):
        try:
            step = open_step(settings, context)
        except SchemaError as error:
            awaited = [name for name in settings.sources if name in unfinished]
            awaited += sorted(unfinished - {*awaited}) if settings.reads_run else []
            if not awaited:
                raise
            statuses.append(TableStatus(settings.name, "absent", note=f"waits for {', '.join(awaited)}"))
            lines.append(f"{settings.name}: {error}")
            unfinished.update(settings.tables)
            continue
        state = step.inspect()
        if state.status != "finished":
            unfinished.update(settings.tables)
        statuses.append(_planned(step, state))
        lines += step.describe(cluster)
    return statuses, lines


def _planned(step: AnyStep, state: State) -> TableStatus:
    record = tables.read_record(step.table) if state.status == "finished" else None
    committed = state.committed
    left = int((~committed.done).sum()) if committed else step.total
    note = {
        "finished": "nothing to do",
        "absent": f"{step.total} rows to do",
        "partial": _left(left, state.again),
        "stale": f"stale: {'; '.join(state.changed)}",
    }[state.status]
    written = record.rows if record else committed.rows if committed else 0
    rejected = record.rejects if record else committed.rejected if committed else 0
    return TableStatus(step.name, state.status, written, rejected, step.total, note=note, record=record)


def _left(rows: int, again: int) -> str:
    retried = f"{again} rows rejected for a temporary reason are tried again"
    return (f"{rows} rows to do; {retried}" if rows else retried) if again else f"{rows} rows to do"


def _resources(address: str | None) -> ClusterResources:
    """What the cluster at `address` has, or this machine, without starting Ray on it."""
    from clipray.engine.connect import connected, local_cpus

    if address and address != "local":
        with connected(address) as cluster:
            return cluster
    import torch

    return ClusterResources((Node(float(max(2, local_cpus())), float(torch.cuda.device_count())),), local=True)
