"""The pages of labels: how many rows have each, which are confused with which, and the rows behind each count."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse

from clipray.errors import JobError
from clipray.report.label_accuracy import NO_LABEL
from clipray.report.label_source import Labels, label_sources, styles_of
from clipray.report.run_tables import RunTable, RunTables
from clipray.serve.pages.layout import Pager, Site, page, table_of_type, version_of
from clipray.serve.pages.tiles import Tile, tile_of, with_texts
from clipray.serve.state import ServedRun
from clipray.serve.templating import path_of

CLASSES = 64  # of a matrix; of more those with the most mistakes
LISTED, ROWS = 500, 48
MISTAKES = 40
SHADES = 9
KEPT = 8  # tables whose counts are kept


@dataclass(frozen=True)
class Cell:
    """Rows of a known label with a predicted one. shade: their share of the known label's rows, 0 to SHADES."""

    known: str
    predicted: str
    rows: int
    shade: int


@dataclass(frozen=True)
class Matrix:
    """Known labels by predicted ones. right: rows on the diagonal; total: rows with a known label."""

    names: list[str]
    lines: list[list[Cell | None]]
    mistakes: list[Cell]
    right: int
    total: int
    labels: int


def labels_page(request: Request) -> HTMLResponse:
    """GET /labels/TABLE?style="""
    site = Site.of(request)
    table = table_of_type(site.run, request.path_params["table"], "labels")
    style, styles = _style(request, table)
    pairs = label_pairs(site.run, table, style)
    counts = (
        pairs.with_columns(pl.col("predicted").fill_null(NO_LABEL))
        .group_by("predicted")
        .agg(pl.col("rows").sum())
        .sort("rows", "predicted", descending=[True, False])
    )
    known = known_labels(site.run.tables, table)
    return page(
        request, "labels.html", table=table, style=style, styles=styles, tables=site.run.tables.of_type("labels"),
        counts=counts.head(LISTED).rows(), n_labels=len(counts), most=int(counts["rows"].max() or 1),  # type: ignore[arg-type]
        matrix=_matrix(pairs.drop_nulls("known")) if known else None, known=known,
    )  # fmt: skip


def label_rows_page(request: Request) -> HTMLResponse:
    """GET /labels/TABLE/rows?style=&predicted=&known=: the rows of a label, or of a cell of the matrix."""
    site = Site.of(request)
    table = table_of_type(site.run, request.path_params["table"], "labels")
    style, _ = _style(request, table)
    asked = {name: request.query_params.get(name) for name in ("known", "predicted")}
    rows = _joined(site.run.tables, table, style, "probability")
    for name, value in asked.items():
        if value is not None:
            rows = rows.filter(pl.col(name).is_null() if value == NO_LABEL else pl.col(name) == value)
    matching = rows.sort("probability", table.ids[-1], descending=[True, False]).collect(engine="streaming")
    pager = Pager.of(request, ROWS, len(matching))
    tiles = [_tile(table.ids, row) for row in matching.slice(pager.offset, ROWS).iter_rows(named=True)]
    return page(
        request, "label_rows.html", table=table, style=style, asked=asked, pager=pager,
        tiles=with_texts(site.run.tables, tiles), more=_more(site, table, pager, {**asked, "style": style}),
    )  # fmt: skip


def _more(site: Site, table: RunTable, pager: Pager, query: dict[str, str | None]) -> Markup | None:
    """The address of the next page, if there is one."""
    if pager.number >= pager.last:
        return None
    return site.link(f"/labels/{path_of(table.name)}/rows", page=pager.number + 1, **query)


def known_labels(run: RunTables, table: RunTable) -> Labels | None:
    """The known labels of the rows of a table, or None."""
    return next((source for source in label_sources(run) if source.known and source.key == table.ids[-1]), None)


def label_pairs(run: ServedRun, table: RunTable, style: str) -> pl.DataFrame:
    """`known`, `predicted` and `rows` of all pairs that occur; `known` is null where it is not known."""
    return _pairs(run, table.name, style, version_of(run))


@functools.lru_cache(KEPT)
def _pairs(run: ServedRun, name: str, style: str, _version: str) -> pl.DataFrame:
    rows = _joined(run.tables, run.table(name), style)
    return rows.group_by("known", "predicted").agg(rows=pl.len().cast(pl.Int64)).collect(engine="streaming")


def _joined(run: RunTables, table: RunTable, style: str, *columns: str) -> pl.LazyFrame:
    """The rows of a table in a style: their ids, `predicted`, `known` and other columns."""
    rows = table.scan(*table.ids, "style", "label", *columns).filter(pl.col("style").cast(pl.String) == style)
    rows = rows.select(*table.ids, *columns, predicted=pl.col("label").cast(pl.String))
    source = known_labels(run, table)
    if source is None:
        return rows.with_columns(known=pl.lit(None, pl.String))
    known = source.table.scan(source.key, source.column)
    known = known.select(source.key, known=pl.col(source.column).cast(pl.String)).drop_nulls()
    return rows.join(known, on=source.key, how="left")


def _matrix(pairs: pl.DataFrame) -> Matrix | None:
    """Of rows `known`, `predicted` and `rows`. None: no label is known."""
    if pairs.is_empty():
        return None
    pairs = pairs.with_columns(pl.col("predicted").fill_null(NO_LABEL))
    totals = dict(pairs.group_by("known").agg(pl.col("rows").sum()).iter_rows())
    cells = {
        (known, predicted): Cell(known, predicted, rows, round(SHADES * rows / totals[known]))
        for known, predicted, rows in pairs.select("known", "predicted", "rows").iter_rows()
    }
    wrong = sorted((c for c in cells.values() if c.known != c.predicted), key=lambda c: (-c.rows, c.known, c.predicted))
    names = _shown(sorted(totals), wrong)
    columns = [*names, *([NO_LABEL] if any(c.predicted == NO_LABEL for c in wrong) else [])]
    lines = [[cells.get((known, predicted)) for predicted in columns] for known in names]
    right = sum(cell.rows for cell in cells.values() if cell.known == cell.predicted)
    return Matrix(columns, lines, wrong[:MISTAKES], right, sum(totals.values()), len(totals))


def _shown(names: list[str], wrong: Sequence[Cell]) -> list[str]:
    """All labels, or of too many those in the most mistakes."""
    if len(names) <= CLASSES:
        return names
    worst = list(dict.fromkeys(name for cell in wrong for name in (cell.known, cell.predicted)))[:CLASSES]
    return [name for name in names if name in worst]


def _tile(ids: Sequence[str], row: dict[str, Any]) -> Tile:
    mark = "" if row["known"] is None else "right" if row["known"] == row["predicted"] else "wrong"
    tile = tile_of({name: row[name] for name in ids}, f"{row['probability']:.0%}", mark)
    facts = [(name, row[name]) for name in ("predicted", "known") if row[name] is not None]
    return replace(tile, facts=tuple(facts))


def _style(request: Request, table: RunTable) -> tuple[str, list[str]]:
    """The style that is asked for, or the first one; and all of them."""
    styles = styles_of(table)
    style = request.query_params.get("style") or (styles[0] if styles else "")
    if styles and style not in styles:
        raise JobError(f"style: expected one of {', '.join(styles)}, found {style[:40]!r}")
    return style, styles
