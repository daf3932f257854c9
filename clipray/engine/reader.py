"""Reading a manifest in tasks: row groups -> blocks of the rows that are wanted. Imports no torch: tasks start fast."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from clipray.engine.progress import Reporter
from clipray.inputs.content_versions import CONTENT_HASH, Contents
from clipray.inputs.key_index import ABSENT, KeyIndex
from clipray.inputs.manifest import read_rows
from clipray.inputs.vector_lookup import Gatherer, Lookup
from clipray.job.row_spec import IMAGES, RowSpec
from clipray.pipelines.messages import fatal
from clipray.storage.parquet import RowGroup, merge_neighbours

GATHERED = "gathered"
READ_ROWS = 16_384  # of small row groups that one task reads together
GATHER_ROWS = 16_384  # whose vectors are looked up together: pairs in any order read each row group once for so many
LISTED_ROWS = 65_536  # whose files are looked at together: a folder is listed once for so many


@dataclass(frozen=True)
class ReadPlan:
    """One pass: what to read and how finely.

    Attributes:
        row_groups: those that hold wanted rows.
        columns: columns to read.
        wanted: the rows to encode.
        rejected: file number -> row numbers that are no work (repeated ids among them, whose key is wanted once).
        rows_per_block: rows that are lost together when a worker dies.
        contents: rows get what is known of their contents, as a column `CONTENT_HASH`; None: they do not.
        careful: one block at a time in each encoder, tried twice: whoever is lost now is itself the cause.
        schema: the manifest's, whose types the columns get.
        lookup, by: rows get the vector of the id in their column `by`, as a column `GATHERED`; null where there is none.
    """

    row_groups: Sequence[RowGroup]
    columns: Sequence[str]
    wanted: KeyIndex
    rejected: dict[int, np.ndarray]
    rows_per_block: int
    careful: bool = False
    contents: Contents | None = None
    spec: RowSpec = IMAGES
    schema: pa.Schema | None = None
    lookup: Lookup | None = None
    by: str = ""

    def items(self, size_bytes: int) -> list[RowGroup]:
        """What a reading task gets: small row groups together, for a task costs as much as some thousands of rows."""
        return merge_neighbours(self.row_groups, READ_ROWS, size_bytes)


class Reader:
    """A row group -> the wanted rows in it, in blocks."""

    def __init__(
        self, this: ReadPlan, wanted: list[Any], rejected: list[Any], lookup: list[Any], rows: int, report: Reporter
    ) -> None:
        self.columns, self.spec, self.by = tuple(this.columns), this.spec, this.by
        self.contents, self.schema = this.contents, this.schema
        # The references travel inside lists: bare ones would be replaced by copies of the arrays.
        self.wanted, self.rejected, self.lookup, self.rows, self.report = wanted, rejected, lookup, rows, report

    def __call__(self, row_groups: pa.Table) -> Iterator[pa.Table]:
        with fatal(self.report):
            gather = Gatherer(ray.get(self.lookup[0])) if self.lookup else None
            for row_group in row_groups.to_pylist():
                for table in self._read(RowGroup(**row_group), max(self.rows, self._together)):
                    rows = table.append_column(GATHERED, gather(table[self.by])) if gather else table
                    yield from (rows.slice(start, self.rows) for start in range(0, len(rows), self.rows))

    @property
    def _together(self) -> int:
        """Rows that are read together beyond a block."""
        listed = self.contents is not None and self.contents.schemes
        return LISTED_ROWS if listed else GATHER_ROWS if self.lookup else 1

    def _read(self, row_group: RowGroup, rows: int) -> Iterator[pa.Table]:
        wanted, rejected = ray.get([self.wanted[0], self.rejected[0]])
        began = time.perf_counter()
        for read in read_rows(row_group, self.columns, rows, self.spec, self.schema):
            keep = wanted.positions(read.table[self.spec.key]) != ABSENT
            keep &= ~np.isin(read.numbers, rejected.get(row_group.file, ()))
            kept = read.table if keep.all() else read.table.filter(pa.array(keep))
            if self.contents:
                kept = kept.append_column(CONTENT_HASH, self.contents.hashes(kept))
            if len(kept):
                self.report({"stage": "read", "rows": len(kept), "seconds": time.perf_counter() - began})
                yield kept
            began = time.perf_counter()
