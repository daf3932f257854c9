"""The map: points of a table of type `map`, drawn by the browser, which gets them as plain arrays."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from clipray import tables
from clipray.errors import JobError
from clipray.queries.facets import facet_of
from clipray.queries.row_columns import RowColumns
from clipray.report.run_tables import RunTable
from clipray.serve.pages.layout import Site, page, table_of_type, version_of
from clipray.serve.pages.tiles import Tile, tile_of, with_texts
from clipray.serve.responses import HttpError, Json
from clipray.serve.state import ServedRun, run_of

MOST_POINTS = 1_000_000
MOST_ROWS = 100  # of one request for tiles
VALUES, SHADES = 20, 250
OTHER, NONE = 254, 255  # codes of values that are not in the legend, and of nulls
KEPT = 4  # maps in memory
CACHED = {"Cache-Control": "private, max-age=3600"}
FIRST = ("cluster_id", "label", "images.label", "labels.label")
"""Columns by which points are coloured first, if they are there."""


@dataclass(frozen=True, eq=False)
class Points:
    """A map in memory. ids: identity columns of its n rows. places: (n, 2) float32, x and y."""

    ids: pa.Table
    places: np.ndarray
    columns: RowColumns


@dataclass(frozen=True)
class Colouring:
    """A column as colours. codes: (n,) uint16, by which `legend` names values, or shades of a range."""

    codes: np.ndarray
    legend: dict[str, Any]


def map_page(request: Request) -> HTMLResponse:
    """GET /map/TABLE"""
    site = Site.of(request)
    table = table_of_type(site.run, request.path_params["table"], "map")
    names = [name for name in _points(site.run, table).columns.schema if name not in table.ids]
    first = next((name for name in FIRST if name in names), names[0] if names else "")
    return page(
        request, "map.html", table=table, columns=names, first=first, version=version_of(site.run),
        tables=site.run.tables.of_type("map"),
    )  # fmt: skip


def map_points(request: Request) -> Response:
    """GET /api/map/points?table=: x and y of all rows, float32, little-endian."""
    run, table = _table(request)
    places = _points(run, table).places.astype("<f4", copy=False)
    return Response(places.tobytes(), media_type="application/octet-stream", headers=CACHED)


def map_codes(request: Request) -> Response:
    """GET /api/map/codes?table=&column=: a code of the column's legend for each row, uint16, little-endian."""
    run, table = _table(request)
    codes = _colouring(run, table, request.query_params.get("column", "")).codes.astype("<u2", copy=False)
    return Response(codes.tobytes(), media_type="application/octet-stream", headers=CACHED)


def map_legend(request: Request) -> Response:
    """GET /api/map/legend?table=&column=: what the codes mean."""
    run, table = _table(request)
    return Json(_colouring(run, table, request.query_params.get("column", "")).legend)


def map_rows(request: Request) -> HTMLResponse:
    """GET /map/TABLE/rows?row=NUMBER&row=…: tiles of these rows, in this order."""
    site = Site.of(request)
    table = table_of_type(site.run, request.path_params["table"], "map")
    asked = request.query_params.getlist("row")
    if len(asked) > MOST_ROWS or not all(number.isdecimal() and len(number) < 12 for number in asked):
        raise JobError(f"row: expected at most {MOST_ROWS} whole numbers")
    points = _points(site.run, table)
    numbers = [int(number) for number in asked if int(number) < len(points.ids)]
    column = request.query_params.get("column", "")
    facts = points.columns.rows(numbers, [column]) if column else [{} for _ in numbers]
    tiles = [_tile(points.ids, number, facts) for number, facts in zip(numbers, facts, strict=True)]
    return page(request, "map_rows.html", table=table, tiles=with_texts(site.run.tables, tiles))


def _tile(ids: pa.Table, number: int, facts: dict[str, Any]) -> Tile:
    (row,) = ids.slice(number, 1).to_pylist()
    return replace(tile_of(row), facts=tuple((n, v) for n, v in facts.items() if v is not None))


def _table(request: Request) -> tuple[ServedRun, RunTable]:
    run = run_of(request)
    return run, table_of_type(run, request.query_params.get("table", ""), "map")


def _points(run: ServedRun, table: RunTable) -> Points:
    """Raises HttpError 422: it has more than MOST_POINTS."""
    if table.record.rows > MOST_POINTS:
        raise HttpError(422, f"{table.name} has {table.record.rows:,} rows; the map shows at most {MOST_POINTS:,}")
    return _read_points(run, table.name, version_of(run))


@functools.lru_cache(KEPT)
def _read_points(run: ServedRun, name: str, _version: str) -> Points:
    table = run.table(name)
    shards = list(tables.iter_table(table.folder.url, [*table.ids, "x", "y"]))
    rows = pa.concat_tables(shards) if shards else pa.table({n: [] for n in (*table.ids, "x", "y")})
    places = np.column_stack([rows[axis].to_numpy().astype(np.float32) for axis in ("x", "y")])
    ids = rows.select(table.ids)
    return Points(ids, places, RowColumns(run.output, ids))


def _colouring(run: ServedRun, table: RunTable, column: str) -> Colouring:
    return _coded(_points(run, table), column)


@functools.lru_cache(2 * KEPT)
def _coded(points: Points, column: str) -> Colouring:
    """Raises JobError: there is no such column."""
    series = points.columns.frame([column])[column]
    facet = facet_of(series, VALUES)
    if facet.values or not facet.rows:
        values = [value for value, _ in facet.values[:VALUES]]
        coded = pl.DataFrame(
            {"value": values, "code": range(len(values))}, schema={"value": series.dtype, "code": pl.UInt16}
        )
        joined = series.to_frame("value").join(coded, on="value", how="left", maintain_order="left")
        codes = joined.select(pl.when(pl.col("value").is_null()).then(NONE).otherwise(pl.col("code").fill_null(OTHER)))
        counts = [{"value": value, "rows": rows} for value, rows in facet.values[:VALUES]]
        rest = facet.rows - sum(each["rows"] for each in counts)
        legend = {"values": counts, "others": facet.n_values - len(counts), "other_rows": rest, "none": facet.nulls}
        return Colouring(codes.to_series().cast(pl.UInt16).to_numpy(), legend)
    numbers = series.to_physical().cast(pl.Float64).to_numpy()
    low, high = (
        np.float64(end) for end in (np.nanmin(numbers[np.isfinite(numbers)]), np.nanmax(numbers[np.isfinite(numbers)]))
    )
    shades = np.where(
        np.isfinite(numbers), (numbers - low) / max(high - low, np.finfo(float).tiny) * (SHADES - 1), NONE
    )
    return Colouring(
        shades.round().astype(np.uint16), {"low": facet.low, "high": facet.high, "shades": SHADES, "none": facet.nulls}
    )
