"""A table that tasks write part by part: shards that are whole and current stay, the others are made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.inputs.vector_column import VectorColumn, read_finite
from clipray.steps.base.monitor import Ticker
from clipray.steps.base.step import RunContext
from clipray.steps.base.table_step import TableStep, VectorStep
from clipray.storage.parquet import RowGroup, chunked

Result = TypeVar("Result")
Shared = TypeVar("Shared")


@dataclass(frozen=True)
class Part:
    """Neighbouring row groups of the input, and the names of the files that their rows go to."""

    row_groups: list[RowGroup]
    names: list[str]

    @property
    def rows(self) -> int:
        return count_rows(self.row_groups)


def numbered(row_groups: Sequence[RowGroup], rows: int) -> list[Part]:
    """Parts of about so many rows, each with one file."""
    return [Part(group, [f"part-{n:06d}.parquet"]) for n, group in enumerate(chunked(row_groups, rows))]


def write_parts(
    step: TableStep[Any], parts: Sequence[Part], write: Callable[[Part, Shared], list[tables.Shard]], shared: Shared,
    run: RunContext, phase: str, *, row_for_row: bool = True,
) -> list[tables.Shard]:  # fmt: skip
    """The shards of a step's table, in the order of `parts`; shards that belong to none, or are damaged, are removed.

    Args:
        write: runs in a worker on a part and `shared`, what all tasks need; writes the part's files.
        row_for_row: a file has a row for each row of its part.

    Raises:
        StaleTableError: Parquet of somebody else lies in the table's folder.
    """
    from clipray.engine.tasks import map_tasks

    rows = {name: part.rows for part in parts for name in part.names}
    names = tables.shard_names(step.table)
    whole, broken = tables.verify_shards(step.table, [name for name in names if name in rows])
    shards = {
        name: whole[name]
        for name, count in rows.items()
        if name in whole and tables.shard_is(step.table, name, step.shard_metadata, count if row_for_row else None)
    }
    if broken:
        run.events.write("repaired", step=step.name, damaged_files=len(broken))
    tables.remove_own(step.table, set(names) - shards.keys(), step.table_type)
    missing = [replace(part, names=[name for name in part.names if name not in shards]) for part in parts]
    todo = [part for part in missing if part.names]
    before, ticker = sum(shard.rows for shard in shards.values()), Ticker(run, step.name, step.total, phase)

    def tick(finished: int) -> None:
        done = sum(part.rows * len(part.names) for part in todo[:finished])
        ticker.at(done, before + done)

    for written in map_tasks(write, todo, run.cluster().cpus, tick, shared):
        shards.update({shard.name: shard for shard in written})
    return [shards[name] for name in rows]


def write_rows(
    step: VectorStep[Any], part: Part, rows_of: Callable[[pa.Table, np.ndarray], pa.Table]
) -> list[tables.Shard]:
    """Write what `rows_of` makes of the identities and vectors of each row group, as the part's one file."""
    (name,) = part.names
    return [
        step.write(
            pa.concat_tables(rows_of(*read_finite(step.source, row_group)) for row_group in part.row_groups), name
        )
    ]


def map_row_groups(
    work: Callable[..., Result], source: VectorColumn, rows: int, run: RunContext, step: str, phase: str, shared: Any = None
) -> Iterator[Result]:  # fmt: skip
    """`work((source, row groups))` in tasks, each on neighbouring row groups of about so many rows; results in their order.

    Args:
        shared: what all tasks need; then it is `work((source, row groups), shared)`.
    """
    from clipray.engine.tasks import map_tasks

    tasks = chunked(source.row_groups, rows)
    ticker = Ticker(run, step, source.n_samples, phase)
    items = [(source, row_groups) for row_groups in tasks]
    yield from map_tasks(
        work, items, run.cluster().cpus, lambda n: ticker.at(sum(map(count_rows, tasks[:n])), 0), shared
    )


def count_rows(row_groups: Sequence[RowGroup]) -> int:
    return sum(row_group.rows for row_group in row_groups)
