"""Opens Parquet and reads it by row groups. Page checksums are verified, and Arrow's threads never hold Python objects.

A file is often opened once per row group, and its footer grows with their number, so recent footers are cached.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from clipray.storage.folder import TEMPORARY, Folder, absolute, explained, filesystem, split

FOOTERS, FOOTER_BYTES = 8, 32 * 2**20  # cached; the last one whatever its size
SETTLED_S = 2.0  # a file that changed more recently may change again with the same timestamp


class ParquetReader:
    """An open Parquet file. Reads raise OSError or `pyarrow.ArrowInvalid` where the file is not whole.

    Timestamps in the old INT96 are read in microseconds: nanoseconds would wrap round after the year 2262.
    """

    def __init__(self, source: Any, *, threads: bool, version: _Version | None = None) -> None:
        held = _FOOTERS.get(version)
        self._file = pq.ParquetFile(
            source, metadata=held, page_checksum_verification=True, coerce_int96_timestamp_unit="us"
        )
        self._threads = threads
        if held is None:
            _FOOTERS.hold(version, self._file.metadata)

    @property
    def schema(self) -> pa.Schema:
        return self._file.schema_arrow

    @property
    def metadata(self) -> pq.FileMetaData:
        return self._file.metadata

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The whole file. columns: None for all."""
        return self._file.read(columns, use_threads=self._threads)

    def read_row_groups(self, numbers: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
        return self._file.read_row_groups(numbers, columns, use_threads=self._threads)

    def iter_batches(
        self, rows: int, row_groups: Sequence[int] | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Batches of at most `rows` rows. row_groups: None for all."""
        return self._file.iter_batches(rows, row_groups, columns, use_threads=self._threads)


_Version = tuple[str | int, ...]
"""Of a file: its path, and what changes when it does."""


class _Footers:
    """A cache of recent footers. Thread-safe."""

    def __init__(self) -> None:
        self._held: dict[_Version, pq.FileMetaData] = {}
        self._lock = threading.Lock()

    def get(self, version: _Version | None) -> pq.FileMetaData | None:
        with self._lock:
            return self._held.get(version) if version else None

    def hold(self, version: _Version | None, footer: pq.FileMetaData) -> None:
        if version is None:
            return
        with self._lock:
            self._held[version] = footer
            while len(self._held) > FOOTERS or (len(self._held) > 1 and self._bytes() > FOOTER_BYTES):
                del self._held[next(iter(self._held))]

    def _bytes(self) -> int:
        return sum(footer.serialized_size for footer in self._held.values())


_FOOTERS = _Footers()


def write_parquet(table: pa.Table, url: str) -> None:
    """Write a table as a whole file at a path or URL."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=65_536)
    folder, name = split(absolute(url))
    Folder(folder).write(name, sink.getvalue().to_pybytes())


def write_parquet_parts(parts: Iterable[pa.Table], path: str) -> None:
    """Write tables of one schema, at least one, as the row groups of a local file, which is seen whole or not at all."""
    aside = f"{path}{TEMPORARY}{uuid.uuid4().hex}"
    coming = iter(parts)
    first = next(coming)
    try:
        with pq.ParquetWriter(aside, first.schema, compression="zstd") as writer:
            for part in itertools.chain([first], coming):
                writer.write_table(part, max(len(part), 1))
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise


@contextlib.contextmanager
def open_parquet(url: str) -> Iterator[ParquetReader]:
    """Open the Parquet file at a path or URL. Raises as `open_parquet_on`."""
    fs, path = filesystem(url)
    with open_parquet_on(fs, path) as parquet:
        yield parquet


@contextlib.contextmanager
def open_parquet_on(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[ParquetReader]:
    """Open the Parquet file at a path of a filesystem.

    A local file is opened by Arrow itself. A remote one is a Python object, which Arrow's threads would release when
    they please, also while the interpreter ends, and so abort the process: there the calling thread reads alone.

    Raises:
        FileNotFoundError: it is not there.
        OSError, pyarrow.ArrowInvalid: it is no regular file, cannot be read, or is not whole.
        StorageError: remote storage denies it, breaks off, or does not answer.
    """
    if isinstance(fs, LocalFileSystem):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise OSError(f"{path}: not a regular file")
        with pa.OSFile(path) as file:
            yield ParquetReader(file, threads=True, version=_local_version(path, status))
    else:
        with explained(fs.unstrip_protocol(path)), fs.open(path, "rb") as file:
            yield ParquetReader(file, threads=False, version=_remote_version(path, file))


def _local_version(path: str, status: os.stat_result) -> _Version | None:
    changed_s = max(status.st_mtime, status.st_ctime)
    if time.time() - changed_s < SETTLED_S:
        return None
    return path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _remote_version(path: str, file: Any) -> _Version | None:
    details = getattr(file, "details", None) or {}
    tag = details.get("ETag") or details.get("etag")
    return (path, tag) if tag else None


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file, or several neighbouring ones: the unit in which rows are read.

    Attributes:
        number: of the first one in its file. count: of the neighbouring ones, from `number` on.
        first_row: number of the first row, in its file or in the whole vector column.
        bytes: uncompressed, of all columns.
        file: number of the file in its manifest.
    """

    path: str
    number: int
    first_row: int
    rows: int
    bytes: int = 0
    count: int = 1
    file: int = 0

    @property
    def numbers(self) -> range:
        return range(self.number, self.number + self.count)

    def read(self, columns: Sequence[str]) -> pa.Table:
        """All rows at once. Columns that the file does not have are left out. Raises as `open_parquet` and its reader."""
        with open_parquet(self.path) as parquet:
            return parquet.read_row_groups(self.numbers, columns)

    def has_no_nulls(self, column: str) -> bool:
        """Whether the footer says so of a column, nested by dots; false where it says nothing."""
        with open_parquet(self.path) as parquet:
            return all(_null_count(parquet.metadata.row_group(number), column) == 0 for number in self.numbers)

    def stream(self, columns: Sequence[str], rows: int) -> Iterator[pa.Table]:
        """As `read`, at most `rows` rows at a time."""
        with open_parquet(self.path) as parquet:
            for batch in parquet.iter_batches(rows, self.numbers, columns):
                yield pa.Table.from_batches([batch])


def _null_count(row_group: pq.RowGroupMetaData, column: str) -> int | None:
    for number in range(row_group.num_columns):
        chunk = row_group.column(number)
        if chunk.path_in_schema == column and chunk.statistics is not None and chunk.statistics.has_null_count:
            return int(chunk.statistics.null_count)
    return None


def merge_neighbours(row_groups: Iterable[RowGroup], rows: int, size_bytes: int) -> list[RowGroup]:
    """Neighbouring row groups of a file as one, up to `rows` rows and `size_bytes`: what is read, or sent, in one go."""
    merged: list[RowGroup] = []
    for row_group in row_groups:
        last = merged[-1] if merged else None
        if (
            last is not None
            and (last.file, last.path, last.numbers.stop) == (row_group.file, row_group.path, row_group.number)
            and last.rows + row_group.rows <= rows
            and last.bytes + row_group.bytes <= size_bytes
        ):
            summed = {name: getattr(last, name) + getattr(row_group, name) for name in ("rows", "bytes", "count")}
            merged[-1] = replace(last, **summed)
        else:
            merged.append(row_group)
    return merged


def chunked(row_groups: Iterable[RowGroup], rows: int) -> list[list[RowGroup]]:
    """Neighbouring row groups together, up to about `rows` rows: what one task works on, or one file holds."""
    chunks: list[list[RowGroup]] = []
    count = 0  # of rows in the last chunk
    for row_group in row_groups:
        if chunks and count + row_group.rows <= rows:
            chunks[-1].append(row_group)
            count += row_group.rows
        else:
            chunks.append([row_group])
            count = row_group.rows
    return chunks
