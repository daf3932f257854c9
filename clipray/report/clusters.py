"""Clusters: of each its size, the commonest labels, and the pictures nearest to its centroid."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from clipray.inputs.row_index import hash_strings
from clipray.report.label_source import SALT, label_sources
from clipray.report.run_tables import RunTable, RunTables
from clipray.report.section import LeftOut, Section
from clipray.report.tiles import Album, Tile

TITLE = "Clusters"
TABLES = 4  # of clusters, with sheets
SHEETS = 40  # in all: of each table its largest clusters
SAMPLE = 20_000  # rows whose labels are counted
COMMONEST = 3


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
    """A table of clusters. rest, rest_rows: clusters without a sheet, and what they hold; sampled: rows with labels."""

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
    found = run.of_kind("clusters")
    if not found:
        return LeftOut(TITLE, "no table of clusters; a step `cluster` makes one")
    sheets = SHEETS // len(found[:TABLES])
    shown = [_clustering(run, table, album, sheets, examples) for table in found[:TABLES]]
    headlines = tuple((f"{each.k}", f"clusters in {each.name}") for each in shown[:1])
    values = {"clusterings": shown, "more": [table.name for table in found[TABLES:]]}
    return Section("clusters", TITLE, values, tuple(each.name for each in shown), headlines)


def _clustering(run: RunTables, table: RunTable, album: Album, most: int, examples: int) -> Clustering:
    sizes = _sizes(run, table)
    total = sum(sizes.values())
    largest = sorted(sizes, key=lambda number: (-sizes[number], number))[:most]
    nearest, drawn = _read(table, largest, examples)
    counts, said = _label_counts(run, table, drawn)
    sheets = []
    for number in largest:
        rows, found = nearest[number], counts.get(number, Counter())
        tiles = [album.tile({name: row[name] for name in table.ids}, _distance(row["distance"])) for row in rows]
        share = sizes[number] / max(total, 1)
        sheets.append(Sheet(number, sizes[number], share, _commonest(found), found.total(), tiles))
    shown = sum(sheet.size for sheet in sheets)
    rest = len(sizes) - len(sheets), total - shown
    return Clustering(table.name, len(sizes), total, _facts(table), sheets, *rest, said, len(drawn))


def _label_counts(run: RunTables, table: RunTable, drawn: pd.DataFrame) -> tuple[dict[int, Counter[str]], str]:
    """By cluster the labels of the rows that were drawn; and what labels they are, "" for none."""
    source = next((source for source in label_sources(run) if source.key in table.ids), None)
    labels = source.of(set(drawn[source.key])) if source else {}
    counts: dict[int, Counter[str]] = {}
    if source is None or not labels:
        return counts, ""
    for number, name in zip(drawn["cluster_id"], drawn[source.key], strict=True):
        if name in labels:
            counts.setdefault(number, Counter())[labels[name]] += 1
    return counts, source.said


def _distance(value: float) -> str:
    return f"{value:.3g} from the centroid"


def _sizes(run: RunTables, table: RunTable) -> dict[int, int]:
    beside = run.beside(table, "centroids")
    parts = [] if beside is None else [part.to_pandas() for part in beside.parts(["cluster_id", "size"])]
    frame = pd.concat(parts) if parts else pd.DataFrame({"cluster_id": [], "size": []})
    return {int(number): int(size) for number, size in zip(frame["cluster_id"], frame["size"], strict=True)}


def _read(table: RunTable, wanted: list[int], nearest: int) -> tuple[dict[int, list[dict[str, Any]]], pd.DataFrame]:
    """One pass: of the wanted clusters the rows with the least distance; and a sample of all rows, drawn by name."""
    columns = [*table.ids, "cluster_id", "distance"]
    best, drawn = pd.DataFrame(columns=columns), pd.DataFrame(columns=[*columns, "draw"])
    for part in table.parts(columns):
        frame = part.to_pandas()
        frame["draw"] = hash_strings(part[table.ids[-1]], SALT)
        drawn = pd.concat([drawn, frame] if len(drawn) else [frame]).nsmallest(SAMPLE, "draw")
        near = frame[frame["cluster_id"].isin(wanted)]
        near = near.iloc[np.lexsort((near[table.ids[-1]].to_numpy(object), near["distance"]))]
        kept = [near.groupby("cluster_id").head(nearest).drop(columns="draw")]
        best = pd.concat([best, *kept] if len(best) else kept).sort_values(["distance", table.ids[-1]])
        best = best.groupby("cluster_id").head(nearest)
    return {number: best[best["cluster_id"] == number].to_dict("records") for number in wanted}, drawn


def _commonest(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:COMMONEST]


def _facts(table: RunTable) -> list[tuple[str, str]]:
    """What the step measured of the whole clustering."""
    figures, names = table.record.figures, ("iterations", "silhouette", "imbalance", "purity", "nmi", "ari")
    return [(name, f"{figures[name]:.4g}") for name in names if isinstance(figures.get(name), int | float)]
