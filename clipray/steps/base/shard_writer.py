"""A table made part by part, in tasks: what is there and still right stays, what is missing is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clipray import tables
from clipray.steps.base.step import RunContext, Ticker
from clipray.steps.base.table_step import TableStep
from clipray.storage.parquet import RowGroup, chunked

Part = tuple[list[RowGroup], list[str]]
"""Neighbouring row groups of the input, and the names of the files that their rows go to."""


def numbered(row_groups: Sequence[RowGroup], rows: int) -> list[Part]:
    """Parts of about so many rows, each with one file."""
    return [(group, [f"part-{n:06d}.parquet"]) for n, group in enumerate(chunked(row_groups, rows))]


def make_parts(
    step: TableStep[Any], parts: Sequence[Part], stamp: Mapping[str, Any], make: Callable[[Any], list[tables.Shard]], run: RunContext,
    phase: str, *, row_for_row: bool = True, given: Any = None,
) -> list[tables.Shard]:  # fmt: skip
    """The shards of a step's table, in the order of `parts`; shards that belong to none, or are damaged, are removed.

    Args:
        stamp: provenance by which a shard is known as right.
        make: runs in a worker on (`given` or the step, row groups, names of the files to write).
        row_for_row: a file has a row for each row of its row groups.
        given: what a task gets in place of the step, where that is less.

    Raises:
        StaleTableError: Parquet of somebody else lies in the table's folder.
    """
    from clipray.engine.tasks import map_tasks

    rows = {name: count_rows(row_groups) for row_groups, names in parts for name in names}
    names = tables.shard_names(step.table)
    whole, broken = tables.verify_shards(step.table, [name for name in names if name in rows])
    shards = {
        name: whole[name]
        for name, count in rows.items()
        if name in whole and tables.shard_is(step.table, name, stamp, count if row_for_row else None)
    }
    if broken:
        run.events.write("repaired", step=step.name, damaged_files=len(broken))
    tables.remove_own(step.table, set(names) - shards.keys(), step.kind)
    missing = [(row_groups, [name for name in names if name not in shards]) for row_groups, names in parts]
    todo = [(row_groups, names) for row_groups, names in missing if names]
    before, ticker = sum(shard.rows for shard in shards.values()), Ticker(run, step.name, step.total, phase)

    def tick(finished: int) -> None:
        done = sum(count_rows(row_groups) * len(names) for row_groups, names in todo[:finished])
        ticker.at(done, before + done)

    for made in map_tasks(make, [(given or step, *part) for part in todo], run.cluster().cpus, tick):
        shards.update({shard.name: shard for shard in made})
    return [shards[name] for name in rows]


def count_rows(row_groups: Sequence[RowGroup]) -> int:
    return sum(row_group.rows for row_group in row_groups)
