"""What the rows of a manifest contain, so that content that changes under the same id is noticed.

A table with the column `content_hash` says of each row what its content was: the hash of its inline bytes, or, where a job asks for that, the version of the
file behind its `uri`. Inline bytes are read again for it only from files of the manifest that are other versions than those that the table was last compared with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipray.inputs.key_index import ABSENT, hash_strings
from clipray.inputs.manifest import Manifest
from clipray.inputs.row_index import READ_BYTES, SCAN_ROWS, RowIndex, mixed, read_safely, rows_at_once
from clipray.storage.folder import filesystem, listed_version, local_version
from clipray.storage.parquet import merge_neighbours
from clipray.storage.uris import is_chain, is_local, parse, split_byte_range

CONTENT_HASH = "content_hash"
HASH_DIGITS = 32  # of 64


@dataclass(frozen=True)
class Contents:
    """How the contents of a manifest's rows are known.

    Attributes:
        inline: the column that holds them, where the manifest has one.
        schemes: of URIs whose files are looked at; none where the job does not ask for that, or the manifest itself says
            what the contents are.
        version: the column with the versions of the rows' files, where the manifest has one.
    """

    inline: str | None
    schemes: tuple[str, ...] = ()
    version: str = ""

    @property
    def columns(self) -> list[str]:
        """What `hashes` reads of a manifest."""
        return [self.inline or self.version] if self.inline or self.version else ["uri"] if self.schemes else []

    def hashes(self, rows: pa.Table) -> pa.Array:
        """The `content_hash` of rows of the manifest; null where there is no content, or its version is unknown."""
        if self.version:
            return rows[self.version].combine_chunks().cast(pa.string())
        if self.inline:
            return hash_contents(rows[self.inline])
        if not self.schemes:
            return pa.nulls(len(rows), pa.string())
        uris = rows["uri"].to_pylist()
        versions = source_versions(uris, self.schemes)
        return pa.array([versions.get(uri) or None for uri in uris], pa.string())


def hash_contents(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The first 16 bytes of each value's SHA-256, as hex digits; null for null."""
    hashes = (hashlib.sha256(value.as_buffer()).hexdigest() if value.is_valid else None for value in column)
    return pa.array([text and text[:HASH_DIGITS] for text in hashes], pa.string())


def source_versions(uris: Iterable[str | None], schemes: Collection[str]) -> dict[str, str]:
    """URI -> size and time of change, or ETag, of its file: of local files, and of those that a listing of their folder shows.

    Missing files, folders that cannot be listed and schemes that are not in `schemes` are left out.
    """
    files = {uri: split_byte_range(uri)[0] for uri in uris if uri and not is_chain(uri)}
    versions = _file_versions(set(files.values()), schemes)
    return {uri: versions[file] for uri, file in files.items() if file in versions}


def _file_versions(files: Collection[str], schemes: Collection[str]) -> dict[str, str]:
    versions: dict[str, str] = {}
    folders: dict[str, list[str]] = defaultdict(list)
    for uri in files:
        scheme, path = parse(uri)
        if scheme in schemes and not is_local(uri):
            folders[uri.rpartition("/")[0]].append(uri)
        elif scheme in schemes:
            with contextlib.suppress(OSError, ValueError):
                versions[uri] = local_version(path)
    for folder, members in folders.items():
        listed = _listing(folder)
        versions |= {uri: listed[name] for uri in members if (name := uri.rpartition("/")[2]) in listed}
    return versions


def _listing(folder: str) -> dict[str, str]:
    """Name -> current version of each file in a folder on remote storage."""
    try:
        fs, path = filesystem(folder)
        fs.invalidate_cache(path)
        entries = fs.ls(path, detail=True)
        fs.invalidate_cache(path)  # nothing a row stays in memory
    except Exception:  # every filesystem has its own errors; the row tells when it is fetched
        return {}
    return {os.path.basename(entry["name"]): listed_version(entry) for entry in entries if entry["type"] == "file"}


def with_contents(manifest: Manifest, scan: RowIndex, contents: Contents, files: Collection[int]) -> RowIndex:
    """The row index with the contents of the rows of these manifest files (by number) in its `sources`.

    A row whose file cannot be looked at keeps its entry, and so counts as unchanged.
    """
    sources, key = scan.sources.copy(), manifest.spec.key
    columns = [key, *contents.columns]
    for row_group in merge_neighbours(
        (row_group for row_group in manifest.row_groups if row_group.file in files), SCAN_ROWS, READ_BYTES
    ):
        rejected = scan.rejected.get(row_group.file, ())
        for read in read_safely(manifest, row_group, columns, rows_at_once(row_group)):
            rows = read.table.filter(pa.array(~np.isin(read.numbers, rejected)))
            hashes = contents.hashes(rows)
            at = scan.index.positions(rows[key])
            known = at != ABSENT
            if contents.schemes:
                known &= hashes.is_valid().to_numpy(zero_copy_only=False)
            sources[at[known]] = mixed(scan.sources[at], hash_strings(hashes, scan.index.seed))[known]
    return dataclasses.replace(scan, sources=sources, contents=True)


def same_content(hashes: pa.ChunkedArray, sources: np.ndarray, expected: np.ndarray, seed: int) -> np.ndarray:
    """(n,) bool: rows of a table whose source is the one that the row index `expected`, as far as it is known.

    Args:
        hashes: their `content_hash`.
        sources: (n,) uint64, hashes of their `uri`.
        expected: (n,) uint64, the scan's `sources` of these rows: with the content, or without where it was not read.
    """
    without = mixed(sources, hash_strings(pa.nulls(1, pa.string()), seed))
    versions = pc.match_substring(hashes, " ").fill_null(True)  # of a file, or of none
    same = (expected == sources) | (expected == mixed(sources, hash_strings(hashes, seed)))
    return same | ((expected == without) & versions.to_numpy())
