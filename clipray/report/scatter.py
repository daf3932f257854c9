"""The scatter plots: the first two components of a sample of rows, coloured by cluster and label, as inline SVG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clipray.inputs.vector_column import VectorColumn, open_vectors, read_vectors
from clipray.report.label_source import label_sources
from clipray.report.run_tables import RunTable, RunTables
from clipray.report.section import LeftOut, Section

TITLE = "The first two components"
WIDTH, HEIGHT, MARGIN = 640.0, 480.0, 14.0
ROW_GROUPS = 64  # row groups that a sample is drawn from, at most
PLOTS = 3  # pairs of a table of components and one of clusters
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
class Panel:
    """The points in one colouring."""

    title: str
    groups: list[Group]


@dataclass(frozen=True)
class Plot:
    """The panels of a sample."""

    name: str
    note: str
    axes: tuple[str, str]
    panels: list[Panel]
    zero: tuple[float, float]
    size: tuple[float, float] = (WIDTH, HEIGHT)


def plot_section(run: RunTables, points: int) -> Section | LeftOut:
    """Scatter plots of the run's reduced tables, with clusters of them or of the same rows."""
    pairs = _pairs(run)
    if not pairs:
        return LeftOut(TITLE, "no table of components; a step `reduce` makes one")
    plots = [_plot(run, reduced, clusters, points) for reduced, clusters in pairs[:PLOTS]]
    shown = [table.name for pair in pairs[:PLOTS] for table in pair if table is not None]
    values = {"plots": plots, "more": len(pairs) - len(plots)}
    return Section("plot", TITLE, values, tuple(dict.fromkeys(shown)))


def _pairs(run: RunTables) -> list[tuple[RunTable, RunTable | None]]:
    reduced = run.of_type("reduced")
    pairs: list[tuple[RunTable, RunTable | None]] = []
    for clusters in run.of_type("clusters"):
        made_of = str(clusters.record.inputs.get("input", "")).rpartition(".")[0]
        fitting = [table for table in reduced if table.ids == clusters.ids]
        fitting.sort(key=lambda table: table.name != made_of)
        pairs += [(table, clusters) for table in fitting[:1]]
    alone = [table for table in reduced if table not in [pair[0] for pair in pairs]]
    return [*pairs, *((table, None) for table in alone)]


def _plot(run: RunTables, reduced: RunTable, clusters: RunTable | None, points: int) -> Plot:
    column = next(name for name, dtype in reduced.record.columns.items() if dtype.startswith("fixed_size_list"))
    vectors = open_vectors(f"{reduced.name}.{column}", run.output)
    ids, xy = sample(vectors, points)
    spots, zero = _spots(xy)
    names, panels = ids[reduced.ids[-1]].to_pylist(), []
    if clusters is not None:
        member = {
            row[clusters.ids[-1]]: row["cluster_id"]
            for row in clusters.where(clusters.ids[-1], names, clusters.ids[-1], "cluster_id")
        }
        panels.append(_by_cluster(f"by cluster, {clusters.name}", spots, [member.get(name) for name in names]))
    source = next((s for s in label_sources(run) if s.key in reduced.ids), None)
    if source is not None:
        owners = ids[source.key].to_pylist()
        labels = source.of(owners)
        if labels:
            panels.append(_by_label(f"by {source.title}", spots, [labels.get(name) for name in owners]))
    if not panels:
        panels.append(Panel("", [Group("all", len(spots), _path(spots), 250.0)]))
    n = vectors.n_samples
    note = f"all {n:,} rows of {reduced.name}" if len(xy) == n else f"{len(xy):,} of the {n:,} rows of {reduced.name}"
    return Plot(reduced.name, note, _axes(run, reduced), panels, zero)


def sample(vectors: VectorColumn, points: int) -> tuple[pa.Table, np.ndarray]:
    """About `points` rows of a vector column, the same ones each time, from row groups all over it.

    Returns:
        (table of the identity columns, (n, 2) float64 first two values; of a single component the second is 0).
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
    return pa.concat_tables(parts), np.concatenate(rows)


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


def _by_cluster(title: str, spots: np.ndarray, member: Sequence[int | None]) -> Panel:
    of = np.array([-1 if number is None else number for number in member])
    numbers = sorted(set(of[of >= 0].tolist()))
    groups = [
        Group(str(number), int((of == number).sum()), _path(spots[of == number]), hue, shade, _middle(spots[of == number]))
        for number, (hue, shade) in zip(numbers, colours(len(numbers)), strict=True)
    ]  # fmt: skip
    return Panel(title, groups)


def _by_label(title: str, spots: np.ndarray, labels: Sequence[str | None]) -> Panel:
    """The commonest labels in colours, over the others in grey."""
    counts = Counter(label for label in labels if label is not None)
    named = [label for label, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][:NAMED_LABELS]
    place = {label: n for n, label in enumerate(named)}
    of = np.array([-2 if label is None else place.get(label, -1) for label in labels])
    groups = [Group("no label", int((of == -2).sum()), _path(spots[of == -2]), None, 1)]
    groups.append(Group(f"{len(counts) - len(named)} others", int((of == -1).sum()), _path(spots[of == -1]), None))
    groups += [
        Group(label, counts[label], _path(spots[of == n]), *colour)
        for n, (label, colour) in enumerate(zip(named, colours(len(named)), strict=True))
    ]
    return Panel(title, [group for group in groups if group.n])


def colours(n: int) -> list[tuple[float, int]]:
    """Hue and shade of n groups: hues evenly spaced, shades alternating if there are many."""
    return [(round(25 + 360 * k / max(n, 1), 1) % 360, k % 2 if n > 8 else 0) for k in range(n)]


def _middle(spots: np.ndarray) -> tuple[float, float]:
    x, y = np.median(spots, axis=0)
    return round(float(x), 1), round(float(y), 1)


def _axes(run: RunTables, reduced: RunTable) -> tuple[str, str]:
    """Names of the axes, with each one's share of the variance."""
    components = run.companion(reduced, "components")
    shares = dict(components.scan("component", "variance_ratio").collect().iter_rows()) if components else {}
    of_variance = [f", {shares[n]:.1%} of the variance" if shares.get(n) is not None else "" for n in (0, 1)]
    return f"component 1{of_variance[0]}", f"component 2{of_variance[1]}"
