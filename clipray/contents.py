"""What the rows of a manifest hold, so that content that is exchanged under the same ids is noticed.

A table with the column `content_hash` says of each row what its content was: the hash of its inline bytes. A manifest file is read again for them only where
it is another version than the one that the table was last compared with.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection

import numpy as np
import pyarrow as pa

from clipray.manifest import Manifest, Piece, joined
from clipray.scan import SCAN_ROWS, Scan, hash_strings, mixed, places, read_safely

CONTENT_HASH = "content_hash"
HASH_BYTES = 16
READ_BYTES = 64 * 2**20  # of inline content at once


def hash_contents(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Of each value the first 16 bytes of its SHA-256, as hex digits; null where it is null."""
    hashes = (hashlib.sha256(value.as_buffer()).hexdigest() if value.is_valid else None for value in column)
    return pa.array([text and text[: 2 * HASH_BYTES] for text in hashes], pa.string())


def with_contents(manifest: Manifest, scan: Scan, files: Collection[int]) -> Scan:
    """The scan, with the contents of the rows of these files (by their numbers) in its `sources`."""
    inline, sources = str(manifest.kind.inline), scan.sources.copy()
    columns = [manifest.kind.key, *(name for name in (inline,) if name in manifest.schema.names)]
    for piece in joined((piece for piece in manifest.pieces if piece.file in files), SCAN_ROWS, READ_BYTES):
        refused = scan.refused.get(piece.file, ())
        for read in read_safely(manifest, piece, columns, rows_at_once(piece)):
            numbers = np.arange(read.first, read.first + len(read.table))
            rows = read.table.filter(pa.array(~np.isin(numbers, refused)))
            hashes = hash_contents(rows[inline]) if inline in columns else pa.nulls(len(rows), pa.string())
            at, known = places(scan.keys, hash_strings(rows[manifest.kind.key], scan.salt))
            sources[at[known]] = mixed(scan.sources[at], hash_strings(hashes, scan.salt))[known]
    return dataclasses.replace(scan, sources=sources, contents=True)


def rows_at_once(piece: Piece) -> int:
    """Rows of a piece that are held together while their contents are read."""
    return max(1, min(SCAN_ROWS, READ_BYTES * piece.rows // max(1, piece.bytes)))


def same_content(hashes: pa.ChunkedArray, sources: np.ndarray, expected: np.ndarray, salt: str) -> np.ndarray:
    """(n,) bool: rows of a table that are made from what the scan `expected`, as far as it knows.

    Args:
        hashes: their `content_hash`.
        sources: (n,) uint64, hashes of their `uri`.
        expected: (n,) uint64, the scan's `sources` of these rows: with the content, or without where it was not read.
    """
    return (expected == sources) | (expected == mixed(sources, hash_strings(hashes, salt)))
