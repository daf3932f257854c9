"""Tables as lazy frames of Polars: read a shard at a time, and of that the columns that a query needs.

Polars calls `register_io_source` unstable, so this module alone uses it. Reading by ourselves keeps the checks of the
shards, our errors and every fsspec URL, which `pl.scan_parquet` does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import polars as pl
import pyarrow as pa
from polars.io.plugins import register_io_source

from clipray.storage.folder import Folder
from clipray.tables.record import iter_table, record_at, schema_of_shard
from clipray.tables.shards import Shard, read_shard, shard_footer


def scan_table(url: str | os.PathLike[str], columns: Sequence[str] = ()) -> pl.LazyFrame:
    """A finished table, which has `columns` at least. Raises as `iter_table`, here and where the frame is collected."""
    folder, record = Folder(os.fspath(url)), record_at(url, columns)
    if not record.files:
        return pl.LazyFrame(schema=dict.fromkeys(record.columns, pl.Null))
    return _scan(schema_of_shard(folder, record, record.files[0]["name"]), lambda names: iter_table(url, names))


def scan_shards(folder: Folder, names: Sequence[str]) -> pl.LazyFrame:
    """One or more shards of a table that need not be finished. Raises as `read_shard`, here and where it is collected."""
    schema = shard_footer(folder, names[0])[1]
    return _scan(schema, lambda columns: (read_shard(folder, name, columns) for name in names))


def figures_of(folder: Folder, shards: Sequence[Shard], **figures: pl.Expr) -> dict[str, Any]:
    """Figures of all rows of some shards, in one pass; empty where there are none. Raises as `read_shard`."""
    if not shards:
        return {}
    rows = scan_shards(folder, [shard.name for shard in shards])
    return rows.select(**figures).collect(engine="streaming").row(0, named=True)


def _scan(schema: pa.Schema, read: Callable[[Sequence[str] | None], Iterable[pa.Table]]) -> pl.LazyFrame:
    def frames(
        columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, _batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        for shard in read(columns):
            frame = pl.DataFrame(shard if columns is None else shard.select(columns))
            frame = (frame if predicate is None else frame.filter(predicate)).slice(0, n_rows)
            yield frame
            n_rows = None if n_rows is None else n_rows - len(frame)

    return register_io_source(frames, schema=pl.DataFrame(schema.empty_table()).schema, is_pure=True)
