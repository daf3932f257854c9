"""A table made part by part, in tasks: what is there and still right stays, what is missing is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clipray import tables
from clipray.inputs.vector_column import Piece, groups
from clipray.steps.base.step import RunContext, Ticker
from clipray.steps.base.table_step import TableStep

Part = tuple[list[Piece], list[str]]
"""Neighbouring pieces of the input, and the names of the files that their rows go to."""


def numbered(pieces: Sequence[Piece], rows: int) -> list[Part]:
    """Parts of about so many rows, each with one file."""
    return [(group, [f"part-{n:06d}.parquet"]) for n, group in enumerate(groups(pieces, rows))]


def make_parts(
    step: TableStep[Any], parts: Sequence[Part], stamp: Mapping[str, Any], make: Callable[[Any], list[tables.Shard]], run: RunContext,
    phase: str, *, row_for_row: bool = True, given: Any = None,
) -> list[tables.Shard]:  # fmt: skip
    """The shards of a step's table, in the order of `parts`; shards that belong to none, or are damaged, are removed.

    Args:
        stamp: provenance by which a shard is known as right.
        make: runs in a worker on (`given` or the step, pieces, names of the files to write).
        row_for_row: a file has a row for each row of its pieces.
        given: what a task gets in place of the step, where that is less.

    Raises:
        StaleTableError: Parquet of somebody else lies in the table's folder.
    """
    from clipray.engine.tasks import map_tasks

    rows = {name: count_rows(pieces) for pieces, names in parts for name in names}
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
    missing = [(pieces, [name for name in names if name not in shards]) for pieces, names in parts]
    todo = [(pieces, names) for pieces, names in missing if names]
    before, ticker = sum(shard.rows for shard in shards.values()), Ticker(run, step.name, step.total, phase)

    def tick(finished: int) -> None:
        done = sum(count_rows(pieces) * len(names) for pieces, names in todo[:finished])
        ticker.at(done, before + done)

    for made in map_tasks(make, [(given or step, *part) for part in todo], run.cluster().cpus, tick):
        shards.update({shard.name: shard for shard in made})
    return [shards[name] for name in rows]


def count_rows(pieces: Sequence[Piece]) -> int:
    return sum(piece.rows for piece in pieces)
