"""The scatter plots: a map of a sample of rows, or their first two components, by cluster and label, as inline SVG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from clipray.inputs.vector_column import VectorColumn, open_vectors, read_vectors
from clipray.report.label_source import draw, first_labels
from clipray.report.run_tables import RunTable, RunTables
from clipray.report.section import LeftOut, Section

MAP, COMPONENTS = "Map", "The first two components"
WIDTH, HEIGHT, MARGIN = 640.0, 480.0, 14.0
ROW_GROUPS = 64  # row groups that a sample is drawn from, at most
PLOTS = 3  # pairs of a table of places and one of clusters
NAMED_LABELS = 11
SEED = 0
FAR = 0.002  # share of the points on each side that may lie outside the frame, where they are drawn on its edge


@dataclass(frozen=True)
class Group:
    """Points of one colour.

    Attributes:
        path: its points as an SVG path of dots. hue: in degrees; None: grey. shade: 0 or 1, of two lightnesses.
        middle: median of its points; None: not to be named in the plot.
    """

    name: str
    n: int
    path: str
    hue: float | None
    shade: int = 0
    middle: tuple[float, float] | None = None


@dataclass(frozen=True)
class Plot:
    """A sample of points, in one or more colourings: `panels`, each with its title. zero: the origin; None: it says nothing."""

    note: str
    axes: tuple[str, str]
    panels: list[tuple[str, list[Group]]]
    zero: tuple[float, float] | None
    size: tuple[float, float] = (WIDTH, HEIGHT)


def plot_section(run: RunTables, points: int) -> Section | LeftOut:
    """Scatter plots of the run's maps, else of its reduced tables, with clusters of them or of the same rows."""
    maps = run.of_type("map")
    title, pairs = MAP if maps else COMPONENTS, _pairs(run, maps or run.of_type("reduced"))
    if not pairs:
        return LeftOut(MAP, "no map and no table of components; a step `project` or `reduce` makes one")
    plots = [_plot(run, places, clusters, points) for places, clusters in pairs[:PLOTS]]
    shown = [table.name for pair in pairs[:PLOTS] for table in pair if table is not None]
    values = {"plots": plots, "more": len(pairs) - len(plots)}
    return Section("plot", title, values, tuple(dict.fromkeys(shown)))


def _pairs(run: RunTables, places: list[RunTable]) -> list[tuple[RunTable, RunTable | None]]:
    """Tables of places, each with the clusters that colour it: a table of clusters goes with what it was made of."""
    pairs: list[tuple[RunTable, RunTable | None]] = []
    for clusters in run.of_type("clusters"):
        made_of = str(clusters.record.inputs.get("input", ""))
        fitting = [table for table in places if table.ids == clusters.ids]
        fitting.sort(
            key=lambda table: made_of not in (f"{table.name}.{_vectors(table)}", table.record.inputs.get("input"))
        )
        pairs += [(table, clusters) for table in fitting[:1]]
    alone = [table for table in places if table not in [pair[0] for pair in pairs]]
    return [*pairs, *((table, None) for table in alone)]


def _plot(run: RunTables, places: RunTable, clusters: RunTable | None, points: int) -> Plot:
    rows, xy = _sample_of_map(places, points) if places.type == "map" else _sample_of_components(run, places, points)
    spots, zero = _spots(xy)
    panels = []
    if clusters is not None:
        key = clusters.ids[-1]
        members = {row[key]: row["cluster_id"] for row in clusters.where(key, rows[key].to_list(), key, "cluster_id")}
        numbers = rows[key].replace_strict(members, default=None, return_dtype=pl.Int64)
        panels.append((f"by cluster, {clusters.name}", _by_cluster(spots, numbers.fill_null(-1).to_numpy())))
    labels, title = first_labels(run, rows)
    if title:
        panels.append((f"by {title}", _by_label(spots, labels.to_list())))
    if not panels:
        panels.append(("", [Group("all", len(spots), _path(spots), 250.0)]))
    n = places.record.rows
    note = f"all {n:,} rows of {places.name}" if len(xy) == n else f"{len(xy):,} of the {n:,} rows of {places.name}"
    return Plot(note, _axes(run, places), panels, None if _is_umap(places) else zero)


def _vectors(reduced: RunTable) -> str:
    return next((name for name, dtype in reduced.record.columns.items() if dtype.startswith("fixed_size_list")), "")


def _is_umap(places: RunTable) -> bool:
    return places.record.summary.get("method") == "umap"


def _sample_of_map(places: RunTable, points: int) -> tuple[pl.DataFrame, np.ndarray]:
    """About `points` rows of a map, the same ones each time: identity columns, and (n, 2) float64."""
    rows = places.scan(*places.ids, "x", "y").bottom_k(points, by=draw(places.ids[-1])).collect(engine="streaming")
    return rows.select(places.ids), rows.select("x", "y").cast(pl.Float64).to_numpy()


def _sample_of_components(run: RunTables, reduced: RunTable, points: int) -> tuple[pl.DataFrame, np.ndarray]:
    return sample(open_vectors(f"{reduced.name}.{_vectors(reduced)}", run.output), points)


def sample(vectors: VectorColumn, points: int) -> tuple[pl.DataFrame, np.ndarray]:
    """About `points` rows of a vector column, the same ones each time, from row groups all over it.

    Returns:
        (identity columns, (n, 2) float64 first two values; of a single component the second is 0).
    """
    row_groups = list(vectors.row_groups)
    if vectors.n_samples > points and len(row_groups) > ROW_GROUPS:
        row_groups = [row_groups[n] for n in np.linspace(0, len(row_groups) - 1, ROW_GROUPS).astype(int)]
    share = min(1.0, points / max(sum(row_group.rows for row_group in row_groups), 1))
    rng, parts, rows = np.random.default_rng(SEED), [], []
    for row_group in row_groups:
        ids, x = read_vectors(vectors, row_group)
        kept = np.sort(rng.choice(len(x), int(np.ceil(share * len(x))), replace=False))
        parts.append(ids.take(pa.array(kept)))
        two = np.zeros((len(kept), 2))
        two[:, : x.shape[1]] = x[kept, :2]
        rows.append(two)
    return pl.DataFrame(pa.concat_tables(parts)), np.concatenate(rows)


def _spots(xy: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Points (n, 2) in the plot's own px, y downwards, both axes in one scale; and where the origin lies."""
    xy = np.nan_to_num(xy, posinf=0, neginf=0)
    low, high = np.quantile(xy, [FAR, 1 - FAR], axis=0)
    inner = np.array([WIDTH, HEIGHT]) - 2 * MARGIN
    scale = float((inner / np.maximum(high - low, 1e-12)).min()) if (high > low).any() else 1.0
    shift = np.array([WIDTH, HEIGHT]) / 2 - scale * np.array([1, -1]) * (low + high) / 2
    spots = xy * scale * np.array([1, -1]) + shift
    spots = np.clip(spots, MARGIN / 2, np.array([WIDTH, HEIGHT]) - MARGIN / 2)
    return spots, (float(shift[0]), float(shift[1]))


def _path(spots: np.ndarray) -> str:
    """Dots: lines of zero length with round ends, one for each distinct pixel."""
    distinct = np.unique(spots.round(0).astype(int), axis=0)
    return "".join(f"M{x} {y}h0" for x, y in distinct.tolist())


def _by_cluster(spots: np.ndarray, cluster_ids: np.ndarray) -> list[Group]:
    """cluster_ids: (n,) -1 where there is none."""
    numbers = np.unique(cluster_ids[cluster_ids >= 0]).tolist()
    members = [spots[cluster_ids == number] for number in numbers]
    return [
        Group(str(number), len(points), _path(points), *colour, _middle(points))
        for number, points, colour in zip(numbers, members, colours(len(numbers)), strict=True)
    ]


def _by_label(spots: np.ndarray, labels: Sequence[str | None]) -> list[Group]:
    """The commonest labels in colours, over the others in grey."""
    counts = Counter(label for label in labels if label is not None)
    named = [label for label, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][:NAMED_LABELS]
    place = {label: n for n, label in enumerate(named)}
    of = np.array([-2 if label is None else place.get(label, -1) for label in labels])
    names = {-2: "no label", -1: f"{len(counts) - len(named)} others", **dict(enumerate(named))}
    shades: list[tuple[float | None, int]] = [(None, 1), (None, 0), *colours(len(named))]
    groups = [
        Group(name, len(spots[of == n]), _path(spots[of == n]), *colour)
        for (n, name), colour in zip(names.items(), shades, strict=True)
    ]
    return [group for group in groups if group.n]


def colours(n: int) -> list[tuple[float, int]]:
    """Hue and shade of n groups: hues evenly spaced, shades alternating if there are many."""
    return [(round(25 + 360 * k / max(n, 1), 1) % 360, k % 2 if n > 8 else 0) for k in range(n)]


def _middle(spots: np.ndarray) -> tuple[float, float]:
    x, y = np.median(spots, axis=0)
    return round(float(x), 1), round(float(y), 1)


def _axes(run: RunTables, places: RunTable) -> tuple[str, str]:
    """Names of the axes, of components with each one's share of the variance."""
    if _is_umap(places):
        return "UMAP 1", "UMAP 2"
    components = run.companion(places, "components")
    shares = dict(enumerate(places.record.summary.get("first_variance_ratios", ())))
    if components is not None:
        shares = dict(components.scan("component", "variance_ratio").collect().iter_rows())
    of_variance = [f", {shares[n]:.1%} of the variance" if shares.get(n) is not None else "" for n in (0, 1)]
    return f"component 1{of_variance[0]}", f"component 2{of_variance[1]}"
