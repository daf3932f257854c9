"""Everything that the tables of a run say of one row."""

from __future__ import annotations

from typing import Any

from clipray.inputs.vector_column import IDENTITIES
from clipray.report.run_tables import RunTable
from clipray.serve.responses import HttpError
from clipray.serve.state import ServedRun

MOST_ROWS = 200  # of one table that are shown for an id: regions, labels in several styles
VECTORS = ("fixed_size_list", "list<element: float", "large_binary", "binary")


def everything_of(run: ServedRun, row_id: str) -> dict[str, Any]:
    """The rows of all tables that name `row_id`: `{"id", "tables": {table: [{column: value}]}}`, without vectors.

    Raises:
        HttpError 404: no table has such a row.
    """
    rows = {table.name: _rows_of(table, row_id) for table in run.tables.tables}
    named = {name: of_table for name, of_table in rows.items() if of_table}
    if not named:
        raise HttpError(404, f"no row {row_id[:200]!r} in run {run.name}")
    return {"id": row_id, "run": run.name, "tables": named}


def _rows_of(table: RunTable, row_id: str) -> list[dict[str, Any]]:
    columns = plain_columns(table)
    named_by = [name for name in IDENTITIES if name in table.record.columns]
    for key in named_by or table.ids[-1:]:
        if rows := table.where(key, [row_id], *columns):
            return rows[:MOST_ROWS]
    return []


def plain_columns(table: RunTable) -> list[str]:
    """The columns of a table but its vectors. Boxes are none."""
    columns = table.record.columns.items()
    return [name for name, dtype in columns if name == "box_xyxy" or not dtype.startswith(VECTORS)]
