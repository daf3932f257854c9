"""Deletes what a run computes again: the tables of `--fresh`, and rejects that are retried."""

from __future__ import annotations

from collections.abc import Sequence

from clipray import tables
from clipray.errors import JobError
from clipray.job import Job
from clipray.job.load import steps_of
from clipray.storage.folder import Folder
from clipray.tables.started import STARTED


def delete_for_rerun(job: Job, output: Folder, fresh: Sequence[str], retry_rejects: bool) -> None:
    """Delete the tables in `fresh` and their companions and, with `retry_rejects`, the rejects of all steps.

    Raises:
        JobError: the job has no such table.
    """
    steps = steps_of(job)
    known = [table for step in steps for table in step.tables]
    for name in fresh:
        if name not in known:
            raise JobError(f"--fresh {name}: the job makes no such table; it makes: {', '.join(known)}")
    for step in steps:
        for table in step.tables if set(fresh) & set(step.tables) else ():
            delete_table(output, table)
        if retry_rejects:
            _forget_rejects(output, step.primary_table)


def delete_table(output: Folder, name: str) -> None:
    """Remove a table that clipray wrote. The record goes first, so that a kill in between leaves an unfinished table."""
    for folder in (output.sub(name), tables.rejects_of(output, name)):
        names = tables.shard_names(folder)
        folder.remove(tables.RECORD)
        tables.remove_own(folder, names)
        for file in (STARTED, tables.DAMAGED):
            folder.remove(file)


def _forget_rejects(output: Folder, name: str) -> None:
    table, rejects = output.sub(name), tables.rejects_of(output, name)
    if tables.shard_names(rejects):
        table.remove(tables.RECORD)
        rejects.remove(tables.RECORD)
        tables.remove_own(rejects, tables.shard_names(rejects), "rejects")
