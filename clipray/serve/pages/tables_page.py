"""The pages of tables: which there are, and any of them as a grid that is paged and sorted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from starlette.requests import Request
from starlette.responses import HTMLResponse

from clipray import tables
from clipray.errors import JobError, no_such
from clipray.inputs.vector_column import IDENTITIES
from clipray.report.run_tables import RunTable
from clipray.serve.pages.layout import Pager, Site, page
from clipray.serve.rows import plain_columns

ROWS = 50
NESTED = ("list", "struct", "fixed_size_list", "map")
NUMBERS = ("int", "uint", "float", "double", "halffloat")
IDS = (*IDENTITIES, "keeper_id", "nearest_id")
"""Columns whose values name a row with a page of its own."""


@dataclass(frozen=True)
class Column:
    """A column of a grid. dtype: of Arrow. is_shown: whether its values are; those of vectors are not."""

    name: str
    dtype: str
    is_shown: bool

    @property
    def is_sortable(self) -> bool:
        return self.is_shown and not self.dtype.startswith(NESTED)

    @property
    def is_number(self) -> bool:
        return self.dtype.startswith(NUMBERS)

    @property
    def is_id(self) -> bool:
        return self.name in IDS

    @property
    def instead(self) -> str:
        """What stands in the place of its values."""
        width = re.search(r"\[(\d+)\]", self.dtype)
        return f"{width[1]} numbers" if width else "bytes" if "binary" in self.dtype else "numbers"


def tables_page(request: Request) -> HTMLResponse:
    """GET /tables"""
    site = Site.of(request)
    docs = {t.name: str(tables.table_schema(t.type)["doc"]).split(":")[0] for t in site.run.tables.tables}
    return page(request, "tables.html", tables=site.run.tables.tables, docs=docs, absent=site.run.tables.absent)


def table_page(request: Request) -> HTMLResponse:
    """GET /tables/NAME?page=&sort=COLUMN&descending=1"""
    site = Site.of(request)
    table = site.run.table(request.path_params["name"])
    shown = set(plain_columns(table))
    columns = [Column(name, dtype, name in shown) for name, dtype in table.record.columns.items()]
    sort, is_descending = request.query_params.get("sort", ""), request.query_params.get("descending") == "1"
    sortable = [column.name for column in columns if column.is_sortable]
    if sort and sort not in sortable:
        raise JobError(f"sort: {no_such('column', sort, sortable)}")
    pager = Pager.of(request, ROWS, table.record.rows)
    numbers = _numbers(table, sort, is_descending, pager)
    rows = rows_at(table, numbers, [column.name for column in columns if column.is_shown])
    return page(
        request, "table.html", table=table, columns=columns, rows=rows, pager=pager, sort=sort,
        is_descending=is_descending, has_images="image_id" in shown and table.type != "texts",
        query={"sort": sort, "descending": "1" if is_descending else None},
        doc=tables.table_schema(table.type)["doc"],
    )  # fmt: skip


def _numbers(table: RunTable, sort: str, is_descending: bool, pager: Pager) -> np.ndarray:
    """Numbers of the rows of a page."""
    if not sort:
        return np.arange(pager.offset, min(pager.offset + pager.size, table.record.rows))
    values = table.scan(sort).collect(engine="streaming")[sort]
    return values.arg_sort(descending=is_descending, nulls_last=True).slice(pager.offset, pager.size).to_numpy()


def rows_at(table: RunTable, numbers: np.ndarray, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a table by their numbers (n,), in this order; only shards that hold one of them are read."""
    starts = np.cumsum([0, *(file["rows"] for file in table.record.files)])
    shards = np.searchsorted(starts, numbers, side="right") - 1
    rows: dict[int, dict[str, Any]] = {}
    for shard in np.unique(shards) if columns else ():
        data = pl.DataFrame(tables.read_shard(table.folder, table.record.files[shard]["name"], list(columns)))
        wanted = numbers[shards == shard]
        rows |= zip(wanted.tolist(), data[(wanted - starts[shard]).tolist()].to_dicts(), strict=True)
    return [rows.get(number, {}) for number in numbers.tolist()]
