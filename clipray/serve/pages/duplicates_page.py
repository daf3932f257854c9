"""The pages of near duplicates: groups side by side, and which row of each is kept."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import polars as pl
from starlette.requests import Request
from starlette.responses import HTMLResponse

from clipray.report.run_tables import RunTable, RunTables
from clipray.serve.pages.layout import Pager, Site, page, table_of_type
from clipray.serve.pages.tiles import Tile, tile_of, with_texts
from clipray.serve.responses import HttpError
from clipray.serve.state import ServedRun

GROUPS, SHOWN, ROWS = 20, 12, 200  # groups of a page, and rows of each; rows of a group on its own page
KEPT = 8  # tables whose groups are kept
COLUMNS = ("group_id", "kept", "similarity")


@dataclass(frozen=True)
class Group:
    """A group. size: its rows, of which `tiles` may be the first only: the one that is kept, then the likest."""

    group_id: int
    size: int
    tiles: list[Tile]


def duplicates_page(request: Request) -> HTMLResponse:
    """GET /duplicates/TABLE: the largest groups first."""
    site = Site.of(request)
    table = table_of_type(site.run, request.path_params["table"], "duplicates")
    sizes = _group_sizes(site.run, table.name, table.record.finished_at)
    pager = Pager.of(request, GROUPS, len(sizes))
    groups = _groups(site.run.tables, table, sizes.slice(pager.offset, GROUPS), SHOWN)
    return page(
        request, "duplicates.html", table=table, groups=groups, pager=pager, facts=table.record.summary,
        similarity=table.record.settings.get("similarity"), tables=site.run.tables.of_type("duplicates"),
    )  # fmt: skip


def duplicate_group_page(request: Request) -> HTMLResponse:
    """GET /duplicates/TABLE/NUMBER"""
    site, number = Site.of(request), request.path_params["group_id"]
    table = table_of_type(site.run, request.path_params["table"], "duplicates")
    sizes = _group_sizes(site.run, table.name, table.record.finished_at).filter(pl.col("group_id") == number)
    if sizes.is_empty():
        raise HttpError(404, f"{table.name}: no group {number}")
    (group,) = _groups(site.run.tables, table, sizes, ROWS)
    return page(request, "duplicate_group.html", table=table, group=group)


@functools.lru_cache(KEPT)
def _group_sizes(run: ServedRun, name: str, _finished_at: str) -> pl.DataFrame:
    """`group_id` and `size` of all groups, the largest first."""
    sizes = run.table(name).scan("group_id").group_by("group_id").agg(size=pl.len()).collect(engine="streaming")
    return sizes.sort("size", "group_id", descending=[True, False])


def _groups(run: RunTables, table: RunTable, sizes: pl.DataFrame, most: int) -> list[Group]:
    """These groups, each with `most` of its rows."""
    rows = table.scan(*table.ids, *COLUMNS).filter(pl.col("group_id").is_in(sizes["group_id"].to_list()))
    rows = rows.sort("kept", "similarity", table.ids[-1], descending=[True, True, False], maintain_order=True)
    first = rows.collect(engine="streaming").group_by("group_id", maintain_order=True).head(most)
    tiles: dict[int, list[Tile]] = {}
    listed = first.to_dicts()
    for row, tile in zip(listed, with_texts(run, list(_tiles(table, listed))), strict=True):
        tiles.setdefault(row["group_id"], []).append(tile)
    return [Group(number, size, tiles[number]) for number, size in sizes.iter_rows()]


def _tiles(table: RunTable, rows: Iterable[dict[str, Any]]) -> Iterable[Tile]:
    for row in rows:
        note = "" if row["kept"] else f"{row['similarity']:.3f}"
        yield tile_of({name: row[name] for name in _identity(table)}, note, "kept" if row["kept"] else "")


def _identity(table: RunTable) -> tuple[str, ...]:
    """Columns that name a row; `keeper_id` names another one."""
    return tuple(name for name in table.ids if name != "keeper_id")
