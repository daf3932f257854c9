"""What the driver knows of a manifest before work starts: a few numbers a row, and no strings.

An id names a row. For counting and filtering it becomes a 64-bit hash, so that a hundred million rows need at most some
gigabytes of the driver's memory. The seed is chosen so that no two ids of a manifest collide.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipray import tables
from clipray.errors import ManifestError
from clipray.inputs.key_index import ABSENT, KeyIndex, digest_of_hashes, hash_strings, seed_of
from clipray.inputs.layout import STATUS, SUCCESS, WHY
from clipray.inputs.manifest import Manifest, Rows, read_rows
from clipray.inputs.parquet_files import is_text
from clipray.job.row_spec import IMAGES, RowSpec
from clipray.storage.folder import versions_by_url
from clipray.storage.parquet import RowGroup, merge_neighbours

NOT_IN_PYTHON = (ArithmeticError, LookupError, ValueError)  # of a value that Arrow holds and Python cannot
SCAN_ROWS, SCAN_BYTES = 131_072, 256 * 2**20  # that are read at once
READ_BYTES = 64 * 2**20  # of inline content at once


@dataclass(frozen=True)
class RowIndex:
    """What the driver knows of every row before work starts.

    Attributes:
        index: of the accepted rows' ids, under a seed with which no two of them collide.
        sources, kept: (n,) uint64, hashes of what it is made from (`uri`, `text`) and of its kept columns, in the
            order of `index`.
        digest: digest of all rows, whatever their order and files.
        rejected: file number -> sorted row numbers that are no work: null ids, repeated ids, strings that are not UTF-8.
        rejects: a row for each rejected row, in the schema of `rejects`.
        versions: URL of each manifest file -> what changes when the file does, or when other rows of it are rejected;
            from before it was read.
        contents: whether `sources` hold what is known of the rows' contents, too; see `clipray.inputs.content_versions`.
        row_group_keys: the keys of each row group's accepted rows; see `row_groups_with`.
    """

    rows: int
    index: KeyIndex
    sources: np.ndarray
    kept: np.ndarray
    digest: str
    rejected: dict[int, np.ndarray]
    rejects: pa.Table
    row_group_keys: list[np.ndarray] = field(repr=False, default_factory=list)
    spec: RowSpec = IMAGES
    versions: dict[str, str] = field(default_factory=dict)
    contents: bool = False

    @property
    def keys(self) -> np.ndarray:
        return self.index.keys


def row_keys(
    table: pa.Table, seed: int, keep: Sequence[str] = (), spec: RowSpec = IMAGES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) uint64 hashes of a table's rows: of the identity, of the source (a resolved `uri`), of the kept columns."""
    keys = hash_strings(table[spec.key], seed)
    sources = np.zeros(len(keys), np.uint64)
    for name in spec.sources:
        there = name in table.column_names
        sources = mixed(sources, hash_strings(table[name] if there else pa.nulls(len(table), pa.string()), seed))
    kept = np.zeros(len(keys), np.uint64)
    for name in keep:
        column = table[name]
        values = column if is_text(column.type) else pa.array(_shown(name, column), pa.string())
        kept = mixed(kept, hash_strings(values, seed))
    return keys, sources, kept


def _shown(name: str, column: pa.ChunkedArray) -> list[str]:
    """Each value as Python shows it. Raises ManifestError: one that Python does not have, such as a date in the year 10000."""
    try:
        return [repr(value) for value in column.to_pylist()]
    except NOT_IN_PYTHON:
        return [_shown_value(name, value) for value in column]


def _shown_value(name: str, value: pa.Scalar) -> str:
    try:
        return repr(value.as_py())
    except UnicodeDecodeError:  # in a list; such a row is rejected
        return ""
    except NOT_IN_PYTHON as error:
        shown = " ".join(str(pa.array([value], value.type)).split())
        raise ManifestError(
            f"`keep` names {name!r}, {value.type}, with a value that Python has not, {shown}: {error}; "
            "leave the column out, or write it as strings or numbers"
        ) from error


def mixed(before: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Hashes of several columns in one; that of a single column is its own."""
    return before * np.uint64(1_099_511_628_211) + more


def scan(manifest: Manifest, keep: Sequence[str] = ()) -> RowIndex:
    """Read ids, sources and kept columns of the whole manifest: find null and repeated ids and strings that are not UTF-8, hash the rest.

    The first row with an id is kept; later ones are rejected.
    """
    versions = versions_by_url(manifest.urls) if manifest.spec.inline else {}
    for attempt in range(8):
        index = _scan(manifest, keep, seed_of("rows", attempt))
        if index is not None:
            return replace(index, versions=_versions(manifest, versions, index.rejected))
    raise ManifestError("ids collide under every seed tried; are they adversarial?")  # practically impossible


def _versions(manifest: Manifest, versions: dict[str, str], rejected: dict[int, np.ndarray]) -> dict[str, str]:
    """URL -> version of the file and which of its rows are rejected: which of two rows with one id counts depends on the files."""
    marks = {n: f" {hashlib.sha256(rows.tobytes()).hexdigest()[:16]}" for n, rows in rejected.items()}
    return {
        url: versions[url] and versions[url] + marks.get(n, "")
        for n, url in enumerate(manifest.urls if versions else ())
    }


def _scan(manifest: Manifest, keep: Sequence[str], seed: int) -> RowIndex | None:
    """None where two ids collide under this seed."""
    spec = manifest.spec
    columns = [*(c for c in manifest.columns(keep) if c != spec.inline), *manifest.download_columns]
    columns_of: list[list[np.ndarray]] = []
    for row_group in merge_neighbours(manifest.row_groups, SCAN_ROWS, SCAN_BYTES):
        for read in read_safely(manifest, row_group, columns):
            has_no_id = pc.fill_null(pc.equal(read.table[spec.key], ""), True).to_numpy()
            unusable_here = has_no_id | _not_utf8(read) | _not_downloaded(manifest, read)
            columns_of.append([*row_keys(read.table, seed, keep, spec), unusable_here])
    empty = np.zeros(0, np.uint64)
    keys, sources, kept, unusable = (
        (np.concatenate([empty, *parts]) for parts in zip(*columns_of)) if columns_of else (empty,) * 4
    )
    unusable = unusable.astype(bool)
    repeated = _repeats(keys, ~unusable)
    positions = np.flatnonzero(unusable | repeated)
    suspects = np.unique(keys[repeated])
    rejects = _rejects(manifest, positions, suspects, keys, columns)
    if rejects is None:
        return None
    accepted = np.ones(len(keys), bool)
    accepted[positions] = False
    starts = np.cumsum([0, *(row_group.rows for row_group in manifest.row_groups)])
    row_groups = [keys[a:b][accepted[a:b]] for a, b in itertools.pairwise(starts)]
    index, order = KeyIndex.of(keys[accepted], seed)
    return RowIndex(
        rows=len(keys),
        index=index,
        sources=sources[accepted][order],
        kept=kept[accepted][order],
        digest=_digest(keys, sources, kept),
        rejected=_by_file(manifest, positions, starts),
        rejects=rejects,
        row_group_keys=row_groups,
        spec=spec,
    )


def rows_at_once(row_group: RowGroup) -> int:
    """How many rows of a row group are in memory at once while their contents are read."""
    return max(1, min(SCAN_ROWS, READ_BYTES * row_group.rows // max(1, row_group.bytes)))


def read_safely(
    manifest: Manifest, row_group: RowGroup, columns: Sequence[str], rows: int = SCAN_ROWS
) -> Iterator[Rows]:
    """As `read_rows`. Raises ManifestError where the file cannot be read."""
    rows = min(rows, rows_at_once(row_group)) if manifest.layout.reads_content else rows
    try:
        yield from read_rows(row_group, columns, rows, manifest.layout, manifest.schema)
    except (pa.ArrowException, OSError) as error:
        first, last = row_group.number, row_group.numbers.stop - 1
        which = f"row group {first}" if first == last else f"row groups {first} to {last}"
        raise ManifestError(f"{row_group.path}: {which} cannot be read: {error}") from error


def _not_utf8(read: Rows) -> np.ndarray:
    """(n,) bool: rows with a string that is not UTF-8."""
    return np.logical_or.reduce([np.zeros(len(read.table), bool), *read.not_utf8.values()])


def _not_downloaded(manifest: Manifest, read: Rows) -> np.ndarray:
    """(n,) bool: rows whose download did not succeed, as the manifest says."""
    if not manifest.download_columns:
        return np.zeros(len(read.table), bool)
    succeeded = pc.equal(read.table[STATUS].cast(pa.string()), SUCCESS)
    return ~pc.fill_null(succeeded, False).to_numpy()


def _repeats(keys: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """(n,) bool: rows whose key occurs in an earlier usable row."""
    rows, repeated = np.flatnonzero(usable), usable.copy()
    repeated[rows[np.unique(keys[rows], return_index=True)[1]]] = False
    return repeated


def _rejects(
    manifest: Manifest, positions: np.ndarray, suspects: np.ndarray, keys: np.ndarray, columns: list[str]
) -> pa.Table | None:
    """The rejects for the rows at `positions`; None where two different ids share one of the keys `suspects`."""
    rows: list[dict[str, Any]] = []
    id_of: dict[int, str] = {}
    rejected, suspected = np.zeros(len(keys), bool), np.isin(keys, suspects)
    rejected[positions] = True
    starts = np.cumsum([0, *(row_group.rows for row_group in manifest.row_groups)])
    at = np.unique(np.searchsorted(starts, np.flatnonzero(rejected | suspected), side="right") - 1)
    for number in at.tolist():
        row_group = manifest.row_groups[number]
        for read in read_safely(manifest, row_group, columns):
            start = int(starts[number]) + read.first - row_group.first_row
            wanted = (*manifest.spec.named, *manifest.download_columns)
            names = [name for name in wanted if name in read.table.column_names]
            for n, row in enumerate(read.table.select(names).to_pylist()):
                position, row_id = start + n, row[manifest.spec.key]
                if suspected[position] and row_id and id_of.setdefault(int(keys[position]), row_id) != row_id:
                    return None
                if rejected[position]:
                    rows.append(_reject(f"row {read.first + n} of {row_group.path}", row, manifest, read, n))
    return pa.Table.from_pylist(rows, schema=tables.rejects_schema(*manifest.spec.named))


def _reject(where: str, row: dict[str, Any], manifest: Manifest, read: Rows, number: int) -> dict[str, Any]:
    key, broken = manifest.spec.key, [name for name, rows in read.not_utf8.items() if rows[number]]
    if broken:
        reason, message = "not_utf8", f"{where}: column {broken[0]!r} holds a string that is not UTF-8"
    elif not row[key]:
        reason, message = "null_id", f"{where}: no {key}"
    elif manifest.download_columns and row[STATUS] != SUCCESS:
        reason, message = "not_downloaded", f"{where}: {row[STATUS]}: {row.get(WHY) or 'no reason is told'}"
    else:
        reason, message = "duplicate_id", f"{where}: {key} {row[key]!r} stands in an earlier row, which is kept"
    named = {name: row.get(name) for name in manifest.spec.named}
    return {**named, key: row[key] or None, "stage": "manifest", "reason": reason, "message": message}


def _by_file(manifest: Manifest, positions: np.ndarray, starts: np.ndarray) -> dict[int, np.ndarray]:
    """Positions among all rows, ascending -> row numbers within each file."""
    at = np.searchsorted(starts, positions, side="right") - 1
    file, first_row = (
        np.array([getattr(row_group, name) for row_group in manifest.row_groups], np.int64)[at]
        for name in ("file", "first_row")
    )
    files, edges = np.unique(file, return_index=True)
    return dict(zip(files.tolist(), np.split(positions - starts[at] + first_row, edges[1:]), strict=False))


def _digest(keys: np.ndarray, sources: np.ndarray, kept: np.ndarray) -> str:
    rows = (keys * np.uint64(0x9E3779B97F4A7C15) ^ sources) * np.uint64(0xBF58476D1CE4E5B9) ^ kept  # wraps around
    return digest_of_hashes(np.sort(rows))


def row_groups_with(manifest: Manifest, scan: RowIndex, wanted: KeyIndex) -> list[RowGroup]:
    """The row groups that hold a wanted row."""
    return [
        row_group
        for row_group, mine in zip(manifest.row_groups, scan.row_group_keys, strict=True)
        if (wanted.positions_of(mine) != ABSENT).any()
    ]
