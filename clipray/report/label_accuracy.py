"""The section on accuracy: metrics of each data set and style, and confusion matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from clipray.report.label_source import styles_of
from clipray.report.run_tables import RunTable, RunTables
from clipray.report.section import LeftOut, Section

TITLE = "How right the labels are"
ROWS = 60  # of figures, by data set and style
MATRICES = 4
CLASSES = 64  # of a matrix; of more those with the most mistakes
SHADES = 10
MISTAKES = 12
METRICS = ("top1", "top3", "top5", "mean_per_class", "ece")
NO_LABEL = "(none)"


@dataclass(frozen=True)
class Matrix:
    """The confusion matrix of a data set in a style.

    Attributes:
        rows, columns: names. left_out: known labels without a row here.
        shades: squares of one cell each, as an SVG path, by whether they are on the diagonal and by their opacity, which
            is their share of the row.
        mistakes: the commonest ones: known, given, rows, share of the known label's rows.
    """

    name: str
    rows: list[str]
    columns: list[str]
    shades: list[tuple[bool, float, str]]
    left_out: int
    mistakes: list[tuple[str, str, int, float]]
    wrong: int
    total: int

    @property
    def cell_px(self) -> int:
        n = max(len(self.rows), len(self.columns))
        return 22 if n <= 12 else 15 if n <= 24 else 11 if n <= 40 else 9

    @property
    def font_px(self) -> int:
        return min(self.cell_px, 12)


def right_section(run: RunTables) -> Section | LeftOut:
    """Tables of figures and matrices of the steps `evaluate_labels`."""
    figures, confusions = run.of_type("label_figures"), run.of_type("confusion")
    if not figures:
        return LeftOut(TITLE, "labels were not held against known ones; a step `evaluate_labels` does that")
    listed = [(table.name, *_figures(table)) for table in figures]
    matrices, more = _matrices(run, confusions)
    best = _best(figures)
    values = {"figures": listed, "matrices": matrices, "more": more}
    used = [table.name for table in (*figures, *confusions)]
    return Section("right", TITLE, values, tuple(used), (best,) if best else ())


def _figures(table: RunTable) -> tuple[list[str], list[dict[str, Any]], int]:
    """Metrics, a row for each data set and style with its figures by metric, and how many rows are left out."""
    columns = ("data_set", "style", "metric", "value", "low", "high", "n", "baseline", "difference")
    figures = table.scan(*columns).collect()
    groups = [group.to_dicts() for group in figures.partition_by("data_set", "style")]
    rows = [{**group[0], "of": {row["metric"]: row for row in group}} for group in groups]
    return [m for m in METRICS if m in figures["metric"]], rows[:ROWS], max(len(rows) - ROWS, 0)


def _best(figures: list[RunTable]) -> tuple[str, str] | None:
    top1 = [(value, name) for table in figures for name, value in dict(table.record.summary.get("top1", {})).items()]
    if not top1:
        return None
    value, name = max(top1)
    return f"{value:.1%}", f"top-1 of {name}"


def _matrices(run: RunTables, tables: list[RunTable]) -> tuple[list[Matrix], int]:
    """One matrix for each data set, of the labels' first style if present; and how many others there are."""
    wanted = {style for labels in run.of_type("labels") for style in styles_of(labels)[:1]}
    chosen: dict[tuple[str, str], tuple[str, pl.DataFrame]] = {}
    total = 0
    for table in tables:
        rows = table.scan("data_set", "style", "label", "predicted", "n").collect()
        for (data_set, style), pairs in rows.partition_by("data_set", "style", as_dict=True).items():
            total += 1
            if style in wanted or (table.name, data_set) not in chosen:
                name = f"{data_set}, {style}" if len(tables) == 1 else f"{table.name}: {data_set}, {style}"
                chosen[table.name, data_set] = name, pairs
    shown = list(chosen.values())[:MATRICES]
    return [_matrix(name, pairs) for name, pairs in shown], total - len(shown)


def _matrix(name: str, pairs: pl.DataFrame) -> Matrix:
    """Of rows `label`, `predicted` and `n`."""
    pairs = pairs.with_columns(pl.col("predicted").fill_null(NO_LABEL))
    totals: dict[str, int] = dict(pairs.group_by("label", maintain_order=True).agg(pl.col("n").sum()).iter_rows())
    wrong = pairs.filter(pl.col("label") != pl.col("predicted"))
    labels = list(totals)
    if len(labels) > CLASSES:
        worst = set(_commonest(wrong, "label", CLASSES))
        labels = [label for label in labels if label in worst]
    foreign = wrong.filter(pl.col("label").is_in(labels) & ~pl.col("predicted").is_in(labels))
    columns = [*labels, *_commonest(foreign, "predicted", max(CLASSES - len(labels), 0))]
    most = wrong.sort("n", "label", "predicted", descending=[True, False, False]).head(MISTAKES)
    mistakes = [
        (known, predicted, n, n / totals[known])
        for known, predicted, n in most.select("label", "predicted", "n").iter_rows()
    ]
    shades = _shades(pairs, totals, labels, columns)
    return Matrix(name, labels, columns, shades, len(totals) - len(labels), mistakes, int(wrong["n"].sum()), sum(totals.values()))  # fmt: skip


def _commonest(pairs: pl.DataFrame, column: str, most: int) -> list[str]:
    """The values of a column with the most rows."""
    rows = pairs.group_by(column).agg(pl.col("n").sum()).sort("n", column, descending=[True, False])
    return rows[column].head(most).to_list()


def _shades(
    pairs: pl.DataFrame, totals: dict[str, int], labels: list[str], columns: list[str]
) -> list[tuple[bool, float, str]]:
    """See `Matrix.shades`."""
    x, y = ({label: n for n, label in enumerate(names)} for names in (columns, labels))
    squares: dict[tuple[bool, float], str] = {}
    for known, predicted, n in pairs.select("label", "predicted", "n").iter_rows():
        if known in y and predicted in x:
            key = known == predicted, max(1, round(SHADES * n / totals[known])) / SHADES
            squares[key] = squares.get(key, "") + f"M{x[predicted]} {y[known]}h1v1h-1z"
    return [(right, shade, path) for (right, shade), path in sorted(squares.items())]
