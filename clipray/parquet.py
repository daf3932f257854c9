"""Opening Parquet: page checksums are verified, and the threads of Arrow never hold a Python object."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from clipray.storage import explained, filesystem


class ParquetReader:
    """An open Parquet file. Reads raise OSError or `pyarrow.ArrowInvalid` where the file is not whole."""

    def __init__(self, source: Any, *, threads: bool) -> None:
        self._file = pq.ParquetFile(source, page_checksum_verification=True)
        self._threads = threads

    @property
    def schema(self) -> pa.Schema:
        return self._file.schema_arrow

    @property
    def metadata(self) -> pq.FileMetaData:
        return self._file.metadata

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The whole file. columns: None for all."""
        return self._file.read(_listed(columns), use_threads=self._threads)

    def read_row_group(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        return self._file.read_row_group(number, _listed(columns), use_threads=self._threads)

    def iter_batches(
        self, rows: int, row_groups: Sequence[int] | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Batches of at most `rows` rows. row_groups: None for all."""
        groups = None if row_groups is None else list(row_groups)
        return self._file.iter_batches(rows, groups, _listed(columns), use_threads=self._threads)


def _listed(columns: Sequence[str] | None) -> list[str] | None:
    return None if columns is None else list(columns)


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
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise OSError(f"{path}: not a regular file")
        with pa.OSFile(path) as file:
            yield ParquetReader(file, threads=True)
    else:
        with explained(fs.unstrip_protocol(path)), fs.open(path, "rb") as file:
            yield ParquetReader(file, threads=False)
