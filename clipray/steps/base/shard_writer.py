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


def write_rows(
    step: VectorStep[Any], rows_of: Callable[[Shared, pa.Table, np.ndarray], pa.Table], shared: Shared,
    run: RunContext, phase: str, *, at_once: int = 2**31,
) -> list[tables.Shard]:  # fmt: skip
    """The shards of a step's table, each with what `rows_of` makes of about `rows_per_file` rows of the input.

    Args:
        rows_of: runs in a worker on `shared`, and on identities and vectors of up to `at_once` rows of a row group.
    """
    groups = chunked(step.source.row_groups, step.settings.rows_per_file)
    parts = [Part(group, [f"part-{n:06d}.parquet"]) for n, group in enumerate(groups)]
    return write_parts(step, parts, _write_rows, (step, rows_of, shared, at_once), run, phase)


def _write_rows(part: Part, task: tuple[VectorStep[Any], Callable[..., pa.Table], Any, int]) -> list[tables.Shard]:
    step, rows_of, shared, at_once = task
    rows: list[pa.Table] = []
    for row_group in part.row_groups:
        ids, x = read_finite(step.source, row_group)
        starts = range(0, len(x), at_once)
        rows += [rows_of(shared, ids.slice(start, at_once), x[start : start + at_once]) for start in starts]
    return [step.write(pa.concat_tables(rows), *part.names)]


def write_parts(
    step: TableStep[Any], parts: Sequence[Part], write: Callable[[Part, Shared], list[tables.Shard]], shared: Shared,
    run: RunContext, phase: str,
) -> list[tables.Shard]:  # fmt: skip
    """The shards of a step's table, in the order of `parts`; shards that belong to none, or are damaged, are removed.

    Args:
        write: runs in a worker on a part and `shared`, what all tasks need; writes the part's files.

    Raises:
        StaleTableError: Parquet of somebody else lies in the table's folder.
    """
    rows = {name: part.rows for part in parts for name in part.names}
    names = tables.shard_names(step.table)
    whole, broken = tables.verify_shards(step.table, [name for name in names if name in rows])
    shards = {
        name: whole[name]
        for name, count in rows.items()
        if name in whole and tables.shard_is(step.table, name, step.shard_metadata, count if step.row_for_row else None)
    }
    if broken:
        run.events.write("repaired", step=step.name, damaged_files=len(broken))
    tables.remove_own(step.table, set(names) - shards.keys(), step.table_type)
    missing = [replace(part, names=[name for name in part.names if name not in shards]) for part in parts]
    todo = [part for part in missing if part.names]
    ticker, written = Ticker(run, step.name, step.total, phase), sum(shard.rows for shard in shards.values())
    rows_todo = [part.rows * len(part.names) for part in todo]
    for of_part in ticker.map_tasks(write, todo, shared, rows=rows_todo, written=written):
        shards.update({shard.name: shard for shard in of_part})
    return [shards[name] for name in rows]


def map_row_groups(
    work: Callable[..., Result], source: VectorColumn, rows: int, run: RunContext, step: str, phase: str, shared: Any = None
) -> Iterator[Result]:  # fmt: skip
    """`work((source, row groups))` in tasks, each on neighbouring row groups of about so many rows; results in their order.

    Args:
        shared: what all tasks need; then it is `work((source, row groups), shared)`.
    """
    items = [(source, row_groups) for row_groups in chunked(source.row_groups, rows)]
    ticker = Ticker(run, step, source.n_samples, phase)
    return ticker.map_tasks(work, items, shared, rows=[count_rows(row_groups) for _, row_groups in items])


def count_rows(row_groups: Sequence[RowGroup]) -> int:
    return sum(row_group.rows for row_group in row_groups)
