"""The pages of clusters: all of a table, and the rows of one."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import polars as pl
from starlette.requests import Request
from starlette.responses import HTMLResponse

from clipray.report.clusters import MEASURED
from clipray.report.label_source import draw, first_labels
from clipray.report.run_tables import RunTable, RunTables
from clipray.serve.pages.layout import Pager, Site, choice, page, table_of_type, version_of
from clipray.serve.pages.tiles import Tile, tile_of, with_texts
from clipray.serve.responses import HttpError
from clipray.serve.state import ServedRun

CLUSTERS, TYPICAL, ROWS = 20, 8, 48  # of a page
SAMPLE = 20_000  # rows whose labels are counted
COMMONEST = 4
ORDERS = {"size": "largest", "mixed": "most mixed", "inertia": "widest", "cluster_id": "by number"}
ROW_ORDERS = {"typical": "typical", "odd": "odd"}
KEPT = 8  # tables whose sums are kept


@dataclass(frozen=True)
class Cluster:
    """A cluster. labels: the commonest of the labels of a sample of its rows; mixed: their entropy in bits."""

    cluster_id: int
    size: int
    mixed: float
    labels: list[tuple[str, int]]
    labelled: int
    tiles: list[Tile]


def clusters_page(request: Request) -> HTMLResponse:
    """GET /clusters/TABLE?order=size|mixed|inertia|cluster_id"""
    site = Site.of(request)
    table = table_of_type(site.run, request.path_params["table"], "clusters")
    order = choice(request, "order", ORDERS)
    sums, title = cluster_sums(site.run, table)
    pager = Pager.of(request, CLUSTERS, len(sums))
    by = [order, "cluster_id"] if order != "cluster_id" else [order]
    shown = sums.sort(by, descending=[order != "cluster_id", False][: len(by)], nulls_last=True).slice(
        pager.offset, CLUSTERS
    )
    tiles = _typical(site.run.tables, table, shown["cluster_id"])
    clusters = [
        Cluster(row["cluster_id"], row["size"], row["mixed"], list(zip(row["labels"] or (), row["counts"] or ())),
                row["labelled"] or 0, tiles.get(row["cluster_id"], []))
        for row in shown.iter_rows(named=True)
    ]  # fmt: skip
    facts = [(name, value) for name in MEASURED if isinstance(value := table.record.summary.get(name), int | float)]
    return page(
        request, "clusters.html", table=table, clusters=clusters, pager=pager, order=order, orders=ORDERS, labels=title,
        most=int(sums["size"].max() or 1), facts=facts, tables=site.run.tables.of_type("clusters"),  # type: ignore[arg-type]
    )  # fmt: skip


def cluster_page(request: Request) -> HTMLResponse:
    """GET /clusters/TABLE/NUMBER?order=typical|odd"""
    site = Site.of(request)
    table, number = (
        table_of_type(site.run, request.path_params["table"], "clusters"),
        int(request.path_params["cluster_id"]),
    )
    sums, title = cluster_sums(site.run, table)
    of_cluster = sums.filter(pl.col("cluster_id") == number).to_dicts()
    if not of_cluster:
        raise HttpError(404, f"{table.name}: no cluster {number}; it has {len(sums)}")
    order = choice(request, "order", ROW_ORDERS)
    pager = Pager.of(request, ROWS, of_cluster[0]["size"])
    rows = table.scan(*table.ids, "cluster_id", "distance").filter(pl.col("cluster_id") == number)
    rows = rows.sort("distance", table.ids[-1], descending=[order == "odd", False])
    shown = rows.slice(pager.offset, ROWS).collect(engine="streaming")
    tiles = with_texts(site.run.tables, [_tile(table, row) for row in shown.to_dicts()])
    return page(
        request, "cluster.html", table=table, cluster=of_cluster[0], tiles=tiles, pager=pager, order=order,
        orders=ROW_ORDERS, labels=title,
    )  # fmt: skip


def cluster_sums(run: ServedRun, table: RunTable) -> tuple[pl.DataFrame, str]:
    """For each cluster its `size`, `inertia`, and of a sample its `labels` with `counts`, `labelled` and `mixed`.

    The second is what labels they are, "" for none.
    """
    return _sums(run, table.name, version_of(run))


@functools.lru_cache(KEPT)
def _sums(run: ServedRun, name: str, _version: str) -> tuple[pl.DataFrame, str]:
    table, tables = run.table(name), run.tables
    centroids = tables.companion(table, "centroids")
    columns = ("cluster_id", "size", "inertia")
    if centroids is None:
        counted = table.scan("cluster_id").group_by("cluster_id").agg(size=pl.len().cast(pl.Int64), inertia=None)
        sizes = counted.collect(engine="streaming")
    else:
        sizes = centroids.scan(*columns).collect()
    sampled = table.scan(*table.ids, "cluster_id").bottom_k(SAMPLE, by=draw(table.ids[-1])).collect(engine="streaming")
    labels, title = first_labels(tables, sampled)
    counts = sampled.select("cluster_id", label=labels).drop_nulls().group_by("cluster_id", "label").len()
    counts = counts.sort("len", "label", descending=[True, False])
    share = pl.col("len") / pl.col("len").sum()
    of_labels = counts.group_by("cluster_id").agg(
        labels=pl.col("label").head(COMMONEST), counts=pl.col("len").head(COMMONEST),
        labelled=pl.col("len").sum(), mixed=-(share * share.log(2)).sum() + 0.0,
    )  # fmt: skip
    return sizes.join(of_labels, on="cluster_id", how="left"), title


def _typical(run: RunTables, table: RunTable, clusters: pl.Series) -> dict[int, list[Tile]]:
    """Of each of these clusters the rows nearest to its centroid."""
    rows = table.scan(*table.ids, "cluster_id", "distance").filter(pl.col("cluster_id").is_in(clusters.to_list()))
    nearest = rows.group_by("cluster_id").agg(pl.struct(*table.ids, "distance").bottom_k_by("distance", TYPICAL))
    lists = dict(nearest.collect(engine="streaming").iter_rows())
    tiles = with_texts(run, [_tile(table, row) for rows in lists.values() for row in rows])
    remaining = iter(tiles)
    return {number: [next(remaining) for _ in rows] for number, rows in lists.items()}


def _tile(table: RunTable, row: dict[str, object]) -> Tile:
    distance = row["distance"]
    assert isinstance(distance, float)
    note = f"{distance:.3g}" if math.isfinite(distance) else ""
    return tile_of({name: row[name] for name in table.ids}, note)
