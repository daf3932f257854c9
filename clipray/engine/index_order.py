"""What index to build, of which rows, and which of them are held out to measure its recall."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clipray.analysis import vector_index as vi
from clipray.inputs.vector_column import VectorColumn
from clipray.storage.folder import Folder
from clipray.storage.parquet import RowGroup

QUERIES = 1_000  # that recall is measured with, at most
HELD_SHARE = 0.1  # of the rows that are held out, at most
FEWEST = 100  # new rows of an index that grows: with fewer nothing is measured


@dataclass(frozen=True)
class IndexPart:
    """Neighbouring row groups; their rows are `first_row`, `first_row` + 1, … of all.

    Attributes:
        numbers: of a part that is in the index: the shard that has its rows' numbers there, and where they begin in it.
    """

    row_groups: list[RowGroup]
    first_row: int
    numbers: tuple[str, int] | None = None

    @property
    def new(self) -> bool:
        return self.numbers is None

    @property
    def rows(self) -> int:
        return sum(row_group.rows for row_group in self.row_groups)


@dataclass(frozen=True)
class IndexSpec:
    """What to build.

    Attributes:
        index_type: factory string. parts: of all rows; tasks fill those that are new.
        queries: whose recall should reach `recall`; None: that of the rows that are held out.
        grown_from: file of an index in the folder, to which the new parts are added.
        on_disk: lists are merged on disk, beside the index.
    """

    source: VectorColumn
    index_type: str
    metric: str
    recall: float
    random_state: int
    parts: list[IndexPart]
    folder: Folder
    name: str
    queries: VectorColumn | None = None
    grown_from: str | None = None
    on_disk: bool = False

    @property
    def n_held_out(self) -> int:
        """How many rows are held out: of an index that grows new ones, and none where they are too few to tell anything."""
        rows, new = self.source.n_samples, sum(part.rows for part in self.parts if part.new)
        if rows < 2 or not vi.extendable(vi.empty_index(self.index_type, self.source.n_features, self.metric)):
            return 0
        wanted = min(QUERIES, max(1, int(HELD_SHARE * rows)))
        return min(wanted, new) if new == rows or new >= min(wanted, FEWEST) else 0


@dataclass(frozen=True, eq=False)
class Probes:
    """What recall is measured with.

    Attributes:
        held_out: (h,) int64, the rows that are held out, ascending. x: (h, d) float32, their vectors.
        others: (q, d) float32, of `IndexSpec.queries`.
        rows: of the table, which has that many numbers.
    """

    held_out: np.ndarray
    x: np.ndarray
    others: np.ndarray
    rows: int

    def numbers(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers (n,) int64 in the index of new rows (n,), and which of them (n,) bool are held out: these come last."""
        before, last = np.searchsorted(self.held_out, rows), self.rows - len(self.held_out)
        held_out = np.isin(rows, self.held_out)
        return np.where(held_out, last + before, rows - before), held_out
