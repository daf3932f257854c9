"""The section on clusters: sizes, commonest labels, and the images nearest to each centroid."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from clipray.report.label_source import draw, first_labels
from clipray.report.run_tables import RunTable, RunTables
from clipray.report.section import LeftOut, Section
from clipray.report.tiles import Album, Tile

TITLE = "Clusters"
TABLES = 4  # of clusters, with sheets
SHEETS = 40  # in all: of each table its largest clusters
SAMPLE = 20_000  # rows whose labels are counted
COMMONEST = 3
MEASURED = ("iterations", "silhouette", "imbalance", "purity", "nmi", "ari")


@dataclass(frozen=True)
class Sheet:
    """A cluster. labels: the commonest ones and how many of the `labelled` rows of a sample have them."""

    cluster_id: int
    size: int
    share: float
    labels: list[tuple[str, int]]
    labelled: int
    tiles: list[Tile]


@dataclass(frozen=True)
class Clustering:
    """A table of clusters.

    Attributes:
        rest, rest_rows: clusters without a sheet, and what they hold. labels: what labels are counted, "" for none.
        sampled: rows whose labels are counted.
    """

    name: str
    k: int
    rows: int
    facts: list[tuple[str, str]]
    sheets: list[Sheet]
    rest: int
    rest_rows: int
    labels: str
    sampled: int


def clusters_section(run: RunTables, album: Album, examples: int) -> Section | LeftOut:
    """A contact sheet for each of the largest clusters."""
    tables = run.of_type("clusters")
    if not tables:
        return LeftOut(TITLE, "no table of clusters; a step `cluster` makes one")
    sheets = SHEETS // len(tables[:TABLES])
    shown = [_clustering(run, table, album, sheets, examples) for table in tables[:TABLES]]
    headlines = tuple((f"{each.k}", f"clusters in {each.name}") for each in shown[:1])
    values = {"clusterings": shown, "more": [table.name for table in tables[TABLES:]]}
    return Section("clusters", TITLE, values, tuple(each.name for each in shown), headlines)


def _clustering(run: RunTables, table: RunTable, album: Album, most: int, examples: int) -> Clustering:
    sizes = _sizes(run, table)
    total = int(sizes["size"].sum())
    largest = sizes.sort("size", "cluster_id", descending=[True, False]).head(most)
    nearest = _nearest(table, largest["cluster_id"], examples)
    sampled = table.scan(*table.ids, "cluster_id").bottom_k(SAMPLE, by=draw(table.ids[-1])).collect(engine="streaming")
    labels, title = first_labels(run, sampled)
    counts = sampled.select("cluster_id", label=labels).drop_nulls().group_by("cluster_id", "label").len()
    counts = counts.sort("len", "label", descending=[True, False])
    sheets = []
    for number, size in largest.iter_rows():
        rows = nearest.filter(pl.col("cluster_id") == number).to_dicts()
        tiles = [album.tile({n: row[n] for n in table.ids}, f"{row['distance']:.3g} from the centroid") for row in rows]
        of_cluster = counts.filter(pl.col("cluster_id") == number).select("label", "len")
        commonest, labelled = of_cluster.head(COMMONEST).rows(), int(of_cluster["len"].sum())
        sheets.append(Sheet(number, size, size / max(total, 1), commonest, labelled, tiles))
    rest = len(sizes) - len(sheets), total - int(largest["size"].sum())
    return Clustering(table.name, len(sizes), total, _facts(table), sheets, *rest, title, len(sampled))


def _sizes(run: RunTables, table: RunTable) -> pl.DataFrame:
    """`cluster_id` and `size` of all clusters."""
    centroids = run.companion(table, "centroids")
    if centroids is None:
        return pl.DataFrame(schema={"cluster_id": pl.Int64, "size": pl.Int64})
    return centroids.scan("cluster_id", "size").collect()


def _nearest(table: RunTable, clusters: pl.Series, examples: int) -> pl.DataFrame:
    """The rows with the least distances of each of these clusters, the nearest first."""
    nearest = pl.DataFrame()
    for rows in table.shards(*table.ids, "cluster_id", "distance"):
        members = rows.filter(pl.col("cluster_id").is_in(clusters.implode()))
        nearest = pl.concat([nearest, members], how="diagonal").sort("distance", table.ids[-1])
        nearest = nearest.group_by("cluster_id", maintain_order=True).head(examples)
    return nearest


def _facts(table: RunTable) -> list[tuple[str, str]]:
    """What the step measured of the whole clustering."""
    figures = table.record.summary
    return [(name, f"{figures[name]:.4g}") for name in MEASURED if isinstance(figures.get(name), int | float)]
