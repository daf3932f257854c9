"""Labels of a run's rows: known ones from the table of images, or those that a model gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from clipray.inputs.key_index import hashed, seed_of
from clipray.report.run_tables import RunTable, RunTables

SEED = seed_of("page")
MOST_NAMES = 100_000  # of labels that are counted
NO_LABEL = ""


def draw(column: str) -> pl.Expr:
    """Hashes of a column of names. The rows with the smallest hashes are a sample that does not depend on row order."""
    return hashed(column, SEED)


@dataclass(frozen=True)
class Labels:
    """A column of labels.

    Attributes:
        key: the column that names its rows. style: only rows of this prompt style; None: all rows.
    """

    table: RunTable
    key: str
    column: str
    style: str | None = None

    @property
    def known(self) -> bool:
        """Whether they are known, and not given by a model."""
        return self.style is None

    @property
    def ids(self) -> tuple[str, ...]:
        """Columns that name its rows, the last of which is the row's own name."""
        return (self.key,) if self.known else self.table.ids

    @property
    def title(self) -> str:
        return f"known label, {self.table.name}.{self.column}" if self.known else f"label given ({self.style})"

    def of(self, names: Collection[str]) -> dict[str, str]:
        """The labels of these rows, by their names; rows without one are left out."""
        style = ["style"] if self.style else []
        rows = self.table.where(self.key, names, self.key, self.column, *style)
        return {
            row[self.key]: str(row[self.column])
            for row in rows
            if row[self.column] is not None and (self.style is None or row["style"] == self.style)
        }

    def shards(self, *columns: str) -> Iterator[pl.DataFrame]:
        """Its rows, shard by shard: `_label`, the columns that name a row, and others of the table."""
        style = ["style"] if self.style else []
        label = pl.col(self.column).cast(pl.String).fill_null(NO_LABEL).alias("_label")
        for rows in self.table.shards(*self.ids, self.column, *style, *columns):
            styled = rows if self.style is None else rows.filter(pl.col("style").cast(pl.String) == self.style)
            yield styled.select(label, *self.ids, *columns)


def label_sources(run: RunTables) -> list[Labels]:
    """All columns of labels: the known ones first, then those that a model gave, one for each style."""
    known = [Labels(table, "image_id", run.label) for table in run.known("images") if run.has_label(table)]
    return known + [
        Labels(table, table.ids[-1], "label", style) for table in run.of_type("labels") for style in styles_of(table)
    ]


def first_labels(run: RunTables, rows: pl.DataFrame) -> tuple[pl.Series, str]:
    """The labels of some rows, null where there is none, and what labels they are; "" where none is known."""
    source = next((source for source in label_sources(run) if source.key in rows.columns), None)
    labels = source.of(rows[source.key].to_list()) if source else {}
    if source is None or not labels:
        return pl.Series([None] * len(rows), dtype=pl.String), ""
    return rows[source.key].replace_strict(labels, default=None, return_dtype=pl.String), source.title


def styles_of(table: RunTable) -> list[str]:
    """The styles of a table of labels: those that its record names, else those of its first rows."""
    named = table.record.summary.get("styles")
    if named:
        return list(named)
    first = next(table.shards("style"), None)
    return [] if first is None else first["style"].cast(pl.String).unique(maintain_order=True).to_list()


@dataclass(frozen=True)
class LabelCounts:
    """How many rows have each label (NO_LABEL: none), and some rows of each, drawn by their names."""

    counts: Counter[str]
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    too_many: bool = False


def count_labels(labels: Labels, examples: int, *columns: str) -> LabelCounts:
    """Count the labels of a column and draw `examples` rows of each, in one pass."""
    counts, drawn = Counter[str](), pl.DataFrame()
    for rows in labels.shards(*columns):
        counts.update(dict(rows["_label"].value_counts().iter_rows()))
        if len(counts) > MOST_NAMES:
            return LabelCounts(counts, too_many=True)
        drawn = pl.concat([drawn, rows], how="diagonal").sort(draw(labels.key), maintain_order=True)
        drawn = drawn.group_by("_label", maintain_order=True).head(examples)
    by_label = drawn.partition_by("_label", as_dict=True) if len(drawn) else {}
    return LabelCounts(counts, {label: rows.to_dicts() for (label,), rows in by_label.items()})
