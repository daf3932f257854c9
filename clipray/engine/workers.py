"""What Ray runs in workers: the stages of a stream, read, decode and encode. Imports no torch: reading tasks start fast."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from clipray.engine.progress import Reporter
from clipray.errors import one_line
from clipray.inputs.content_versions import CONTENT_HASH, Contents
from clipray.inputs.key_index import ABSENT, KeyIndex
from clipray.inputs.layout import Layout
from clipray.inputs.manifest import read_rows
from clipray.inputs.vector_lookup import Gatherer, Lookup
from clipray.storage.parquet import RowGroup

if TYPE_CHECKING:
    from clipray.pipelines.spec import BlockFunction, ClassTexts, EncodedClasses, EncoderSpec, ImageSpec

GATHERED = "gathered"
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
        layout, schema: the manifest's, whose types the columns get.
        lookup, by: rows get the vector of the id in their column `by`, as a column `GATHERED`; null where there is none.
    """

    row_groups: Sequence[RowGroup]
    columns: Sequence[str]
    wanted: KeyIndex
    rejected: dict[int, np.ndarray]
    rows_per_block: int
    careful: bool = False
    contents: Contents | None = None
    layout: Layout = field(default_factory=Layout)
    schema: pa.Schema | None = None
    lookup: Lookup | None = None
    by: str = ""


@contextlib.contextmanager
def fatal(report: Reporter) -> Iterator[None]:
    """An error that is no row's fault ends the run: Ray Data would only drop the block and go on."""
    try:
        yield
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = one_line(error, 600)
        where = f"{os.path.basename(place.filename)}:{place.lineno}"
        report({"fatal": f"{type(error).__name__}: {reason} ({where})"})
        raise


class Reader:
    """A row group -> the wanted rows in it, in blocks."""

    def __init__(
        self, this: ReadPlan, wanted: list[Any], rejected: list[Any], lookup: list[Any], rows: int, report: Reporter
    ) -> None:
        self.columns, self.layout, self.by = tuple(this.columns), this.layout, this.by
        self.contents, self.schema = this.contents, this.schema
        # The references travel inside lists: bare ones would be replaced by copies of the arrays.
        self.wanted, self.rejected, self.lookup, self.rows, self.report = wanted, rejected, lookup, rows, report

    def __call__(self, row_groups: pa.Table) -> Iterator[pa.Table]:
        with fatal(self.report):
            gather = Gatherer(ray.get(self.lookup[0])) if self.lookup else None
            listed = self.contents is not None and self.contents.schemes
            together = LISTED_ROWS if listed else GATHER_ROWS if self.lookup else 1
            for row_group in row_groups.to_pylist():
                for table in self._read(RowGroup(**row_group), max(self.rows, together)):
                    rows = table.append_column(GATHERED, gather(table[self.by])) if gather else table
                    yield from (rows.slice(start, self.rows) for start in range(0, len(rows), self.rows))

    def _read(self, row_group: RowGroup, rows: int) -> Iterator[pa.Table]:
        wanted, rejected = ray.get([self.wanted[0], self.rejected[0]])
        began = time.perf_counter()
        for read in read_rows(row_group, self.columns, rows, self.layout, self.schema):
            keep = wanted.positions(read.table[self.layout.spec.key]) != ABSENT
            keep &= ~np.isin(read.numbers, rejected.get(row_group.file, ()))
            kept = read.table if keep.all() else read.table.filter(pa.array(keep))
            if self.contents:
                kept = kept.append_column(CONTENT_HASH, self.contents.hashes(kept))
            if len(kept):
                self.report({"stage": "read", "rows": len(kept), "seconds": time.perf_counter() - began})
                yield kept
            began = time.perf_counter()


class Decode:
    """Blocks of manifest rows -> the same with `pixels`, in CPU tasks; see `BlockDecoder`."""

    def __init__(self, spec: ImageSpec, report: Reporter) -> None:
        self.spec, self.report = spec, report
        self._decode: BlockFunction | None = None

    def __call__(self, block: pa.Table) -> pa.Table:
        with fatal(self.report):
            if self._decode is None:
                from clipray.pipelines.image_loader import BlockDecoder

                self._decode = BlockDecoder(self.spec, self.report)
            return self._decode(block)


class Encode:
    """Blocks of manifest rows, or of pixels -> rows of the table, in an actor; see `BlockEncoder`."""

    def __init__(self, spec: EncoderSpec, report: Reporter) -> None:
        report({"starting": os.getpid()})
        self.report = report
        with fatal(report):
            self._encode = spec.build(report)

    def __call__(self, block: pa.Table) -> pa.Table:
        with fatal(self.report):
            return self._encode(block)


def encode_classes(work: ClassTexts) -> EncodedClasses:
    """A task; see `class_texts.encode_classes`."""
    from clipray.pipelines import class_texts

    return class_texts.encode_classes(work)
