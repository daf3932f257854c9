"""How right labels are: the figures of each data set and style, and what was taken for what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

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
    """Known against given labels of a data set in a style.

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
    figures, confusions = run.of_kind("label_figures"), run.of_kind("confusion")
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
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for part in table.parts(["data_set", "style", "metric", "value", "low", "high", "n", "baseline", "difference"]):
        for row in part.to_pylist():
            key = row["data_set"], row["style"]
            entry = rows.setdefault(key, {"data_set": key[0], "style": key[1], "n": row["n"], "of": {}})
            entry["of"][row["metric"]] = row
    seen = {metric for row in rows.values() for metric in row["of"]}
    return [m for m in METRICS if m in seen], list(rows.values())[:ROWS], max(len(rows) - ROWS, 0)


def _best(figures: list[RunTable]) -> tuple[str, str] | None:
    found = [(value, name) for table in figures for name, value in dict(table.record.figures.get("top1", {})).items()]
    if not found:
        return None
    value, name = max(found)
    return f"{value:.1%}", f"top-1 of {name}"


def _matrices(run: RunTables, tables: list[RunTable]) -> tuple[list[Matrix], int]:
    """Of each data set in one style, the first of the labels' own where it is there; and how many others there are."""
    wanted = {style for labels in run.of_kind("labels") for style in styles_of(labels)[:1]}
    chosen: dict[tuple[str, str], tuple[str, pd.DataFrame]] = {}
    total = 0
    for table in tables:
        for (data_set, style), rows in _groups(table):
            total += 1
            if style in wanted or (table.name, data_set) not in chosen:
                name = f"{data_set}, {style}" if len(tables) == 1 else f"{table.name}: {data_set}, {style}"
                chosen[table.name, data_set] = name, rows
    shown = list(chosen.values())[:MATRICES]
    return [_matrix(name, rows) for name, rows in shown], total - len(shown)


def _groups(table: RunTable) -> Iterator[tuple[tuple[str, str], pd.DataFrame]]:
    parts = [part.to_pandas() for part in table.parts(["data_set", "style", "label", "predicted", "n"])]
    frame = pd.concat(parts) if parts else pd.DataFrame(columns=["data_set", "style"])
    yield from frame.groupby(["data_set", "style"], sort=False)


def _matrix(name: str, pairs: pd.DataFrame) -> Matrix:
    pairs = pairs.assign(predicted=pairs["predicted"].fillna(NO_LABEL))
    totals = pairs.groupby("label", sort=False)["n"].sum()
    wrong = pairs[pairs["label"] != pairs["predicted"]]
    labels = list(totals.index)
    if len(labels) > CLASSES:
        worst = set(wrong.groupby("label")["n"].sum().nlargest(CLASSES).index)
        labels = [label for label in labels if label in worst]
    shown = set(labels)
    foreign = wrong[wrong["label"].isin(shown) & ~wrong["predicted"].isin(shown)]
    extra = foreign.groupby("predicted")["n"].sum().nlargest(max(CLASSES - len(labels), 0)).index
    columns = [*labels, *extra]
    x, y = ({label: n for n, label in enumerate(names)} for names in (columns, labels))
    shades: dict[tuple[bool, float], list[str]] = {}
    for known, given, n in zip(pairs["label"], pairs["predicted"], pairs["n"], strict=True):
        if known in y and given in x:
            shade = max(1, round(SHADES * float(n) / float(totals[known]))) / SHADES
            shades.setdefault((known == given, shade), []).append(f"M{x[given]} {y[known]}h1v1h-1z")
    paths = [(right, shade, "".join(squares)) for (right, shade), squares in sorted(shades.items())]
    most = wrong.sort_values(["n", "label", "predicted"], ascending=[False, True, True]).head(MISTAKES)
    mistakes = [
        (known, given, int(n), float(n) / float(totals[known]))
        for known, given, n in zip(most["label"], most["predicted"], most["n"], strict=True)
    ]
    return Matrix(name, labels, columns, paths, len(totals) - len(labels), mistakes, int(wrong["n"].sum()), int(totals.sum()))  # fmt: skip
