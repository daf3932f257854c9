"""What rows of a run are labelled as: known labels where the pictures' table has them, else those that a model gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from clipray.inputs.row_index import hash_strings
from clipray.report.run_tables import RunTable, RunTables

SALT = "clipray-page-000"  # 16 bytes
MOST_NAMES = 100_000  # of labels that are counted
NO_LABEL = ""


@dataclass(frozen=True)
class Labels:
    """A column of labels.

    Attributes:
        key: the column that names its rows. style: only rows of this prompt style; None: all rows.
        known: whether they are known, and not given by a model.
    """

    table: RunTable
    key: str
    column: str
    style: str | None = None

    @property
    def known(self) -> bool:
        return self.style is None

    @property
    def ids(self) -> tuple[str, ...]:
        """Columns that name its rows, the last of which is the row's own name."""
        return (self.key,) if self.known else self.table.ids

    @property
    def said(self) -> str:
        return f"known label, {self.table.name}.{self.column}" if self.known else f"label given ({self.style})"

    def of(self, names: set[str]) -> dict[str, str]:
        """The labels of these rows, by their names; rows without one are left out."""
        columns = [self.key, self.column, *(["style"] if self.style else [])]
        rows = self.table.where(self.key, names, columns)
        return {
            row[self.key]: str(row[self.column])
            for row in rows
            if row[self.column] is not None and (self.style is None or row["style"] == self.style)
        }

    def parts(self, *columns: str) -> Iterator[pa.Table]:
        """Its rows, shard by shard: `_label`, the columns that name a row, and others of the table."""
        style = ["style"] if self.style else []
        for part in self.table.parts([*self.ids, self.column, *style, *columns]):
            rows = part if self.style is None else part.filter(pc.equal(part["style"], self.style))
            label = rows[self.column].cast(pa.string()).fill_null(NO_LABEL)
            yield pa.table({"_label": label, **{name: rows[name] for name in (*self.ids, *columns)}})


def label_sources(run: RunTables) -> list[Labels]:
    """Columns of labels of whole rows, the known ones first, then those given, a style each."""
    known = [Labels(table, "image_id", run.label) for table in run.pictures if run.has_label(table)]
    given = [
        Labels(table, table.ids[-1], "label", style) for table in run.of_kind("labels") for style in styles_of(table)
    ]
    return [*known, *given]


def styles_of(table: RunTable) -> list[str]:
    """The styles of a table of labels: those that its record names, else those of its first rows."""
    named = table.record.figures.get("styles")
    if named:
        return list(named)
    first = next(iter(table.parts(["style"])), None)
    return [] if first is None else pc.unique(first["style"]).to_pylist()


@dataclass
class Counted:
    """How many rows have each label (NO_LABEL: none), and some rows of each, drawn by their names."""

    counts: Counter[str]
    examples: dict[str, list[dict[str, object]]]
    too_many: bool = False


def count_labels(labels: Labels, examples: int, *columns: str) -> Counted:
    """One pass over a column of labels. Draws `examples` rows of each label, the same ones in any order of the table."""
    counts, drawn = Counter[str](), pd.DataFrame()
    for part in labels.parts(*columns):
        frame = part.to_pandas()
        counts.update(frame["_label"].value_counts().to_dict())
        if len(counts) > MOST_NAMES:
            return Counted(counts, {}, too_many=True)
        if examples:
            frame["_draw"] = hash_strings(part[labels.key], SALT)
            drawn = _first(pd.concat([drawn, _first(frame, examples)]), examples)
    found = {str(name): rows.to_dict("records") for name, rows in drawn.groupby("_label")} if len(drawn) else {}
    return Counted(counts, found)


def _first(frame: pd.DataFrame, examples: int) -> pd.DataFrame:
    ordered = frame.iloc[np.argsort(frame["_draw"].to_numpy(), kind="stable")]
    return ordered.groupby("_label", sort=False).head(examples)
