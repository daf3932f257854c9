"""What the driver knows of a manifest before work starts: a few numbers per row, and no strings.

Rows are known by their identity. For counting and filtering an id becomes a 64-bit hash, so that a hundred million rows
need some gigabytes of driver memory at the most; the hash's key is chosen so that no two ids of a manifest collide.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from clipray import tables
from clipray.errors import ManifestError
from clipray.inputs.manifest import Manifest, Rows, read_rows
from clipray.inputs.parquet_files import is_text
from clipray.job.row_spec import PICTURES, RowSpec
from clipray.storage.folder import file_versions
from clipray.storage.parquet import RowGroup, merge_neighbours

NOT_IN_PYTHON = (ArithmeticError, LookupError, ValueError)  # of a value that Arrow holds and Python cannot
SCAN_ROWS, SCAN_BYTES = 131_072, 256 * 2**20  # that are read at once


@dataclass(frozen=True)
class RowIndex:
    """What the driver knows of every row before work starts.

    Attributes:
        keys: (n,) uint64, hash of each accepted row's id, sorted.
        sources, kept: (n,) uint64, hashes of what it is made from (`uri`, `text`) and of its kept columns, in the
            order of `keys`.
        salt: the key of the hash, chosen so that `keys` are unique.
        digest: digest of all rows, whatever their order and files.
        refused: file number -> sorted row numbers that are no work: null ids, repeated ids, strings that are not UTF-8.
        rejects: one row per refused row, in the schema of `rejects`.
        versions: URL of each manifest file -> what changes when the file does, or when other rows of it are refused;
            from before it was read.
        contents: whether `sources` hold what is known of the rows' contents, too; see `clipray.inputs.content_versions`.
        row_group_keys: the keys of each row group's accepted rows; see `row_groups_with`.
    """

    rows: int
    keys: np.ndarray
    sources: np.ndarray
    kept: np.ndarray
    salt: str
    digest: str
    refused: dict[int, np.ndarray]
    rejects: pa.Table
    row_group_keys: list[np.ndarray] = field(repr=False, default_factory=list)
    kind: RowSpec = PICTURES
    versions: dict[str, str] = field(default_factory=dict)
    contents: bool = False


def row_keys(
    table: pa.Table, salt: str, keep: Sequence[str] = (), kind: RowSpec = PICTURES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) uint64 hashes of a table's rows: of the identity, of the source (a resolved `uri`), of the kept columns."""
    keys = hash_strings(table[kind.key], salt)
    sources = np.zeros(len(keys), np.uint64)
    for name in kind.sources:
        there = name in table.column_names
        sources = mixed(sources, hash_strings(table[name] if there else pa.nulls(len(table), pa.string()), salt))
    kept = np.zeros(len(keys), np.uint64)
    for name in keep:
        column = table[name]
        values = column if is_text(column.type) else pa.array(_shown(name, column), pa.string())
        kept = mixed(kept, hash_strings(values, salt))
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


def hash_strings(column: pa.ChunkedArray | pa.Array, salt: str) -> np.ndarray:
    """(n,) uint64 keyed hash (SipHash) of a string column, the same on every machine and version."""
    if pa.types.is_dictionary(column.type):  # whose nulls `to_numpy` would show as a category
        column = column.cast(pa.string())
    values = np.asarray(
        column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy(), dtype=object
    )
    values[pd.isna(values)] = "\0null"
    return pd.util.hash_array(values, hash_key=salt, categorize=False)


def scan(manifest: Manifest, keep: Sequence[str] = ()) -> RowIndex:
    """Read ids, sources and kept columns of the whole manifest: find null and repeated ids and what is not UTF-8, hash the rest.

    Of rows with the same id the first is kept; the others become rejects.
    """
    versions = file_versions(manifest.urls) if manifest.kind.inline else {}
    for attempt in range(8):
        found = _scan(manifest, keep, f"clipray-{attempt:08d}")
        if found is not None:
            return replace(found, versions=_versions(manifest, versions, found.refused))
    raise ManifestError("ids collide under every hash key tried; are they adversarial?")  # practically impossible


def _versions(manifest: Manifest, versions: dict[str, str], refused: dict[int, np.ndarray]) -> dict[str, str]:
    """Of each file its version and which of its rows are no work: of rows of one id another counts when files come and go."""
    marks = {n: f" {hashlib.sha256(rows.tobytes()).hexdigest()[:16]}" for n, rows in refused.items()}
    return {
        url: versions[url] and versions[url] + marks.get(n, "")
        for n, url in enumerate(manifest.urls if versions else ())
    }


def _scan(manifest: Manifest, keep: Sequence[str], salt: str) -> RowIndex | None:
    kind = manifest.kind
    columns = [c for c in manifest.columns(keep) if c != kind.inline]
    columns_of: list[list[np.ndarray]] = []
    for row_group in merge_neighbours(manifest.row_groups, SCAN_ROWS, SCAN_BYTES):
        for read in read_safely(manifest, row_group, columns):
            ids = read.table[kind.key]
            columns_of.append([*row_keys(read.table, salt, keep, kind), _null_ids(ids), _not_utf8(read)])
    empty = np.zeros(0, np.uint64)
    keys, sources, kept, null, not_utf8 = (
        (np.concatenate([empty, *parts]) for parts in zip(*columns_of)) if columns_of else (empty,) * 5
    )
    unusable = null.astype(bool) | not_utf8.astype(bool)
    repeated = _repeats(keys, ~unusable)
    positions = np.flatnonzero(unusable | repeated)
    suspects = np.unique(keys[repeated])
    rejects, collided = _refused_rows(manifest, positions, suspects, keys, columns)
    if collided:
        return None
    accepted = np.ones(len(keys), bool)
    accepted[positions] = False
    starts = np.cumsum([0, *(row_group.rows for row_group in manifest.row_groups)])
    row_groups = [keys[a:b][accepted[a:b]] for a, b in itertools.pairwise(starts)]
    order = np.argsort(keys[accepted], kind="stable")
    return RowIndex(
        rows=len(keys),
        keys=keys[accepted][order],
        sources=sources[accepted][order],
        kept=kept[accepted][order],
        salt=salt,
        digest=_digest(keys, sources, kept),
        refused=_by_file(manifest, positions, starts),
        rejects=rejects,
        row_group_keys=row_groups,
        kind=kind,
    )


def read_safely(
    manifest: Manifest, row_group: RowGroup, columns: Sequence[str], rows: int = SCAN_ROWS
) -> Iterator[Rows]:
    """As `read_rows`. Raises ManifestError where the file cannot be read."""
    try:
        yield from read_rows(row_group, columns, rows, manifest.kind, manifest.schema)
    except (pa.ArrowException, OSError) as error:
        first, last = row_group.number, row_group.numbers.stop - 1
        which = f"row group {first}" if first == last else f"row groups {first} to {last}"
        raise ManifestError(f"{row_group.path}: {which} cannot be read: {error}") from error


def _not_utf8(read: Rows) -> np.ndarray:
    """(n,) bool: rows with a string that is not UTF-8."""
    return np.logical_or.reduce([np.zeros(len(read.table), bool), *read.not_utf8.values()])


def _null_ids(ids: pa.ChunkedArray) -> np.ndarray:
    return np.array([not value for value in ids.to_numpy()], bool)  # an empty string is no identity either


def _repeats(keys: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """(n,) bool: rows whose key stood in an earlier usable row."""
    repeated = np.zeros(len(keys), bool)
    rows = np.flatnonzero(usable)
    order = rows[np.argsort(keys[rows], kind="stable")]
    repeated[order[1:][keys[order[1:]] == keys[order[:-1]]]] = True
    return repeated


def _refused_rows(
    manifest: Manifest, positions: np.ndarray, suspects: np.ndarray, keys: np.ndarray, columns: list[str]
) -> tuple[pa.Table, bool]:
    """The rejects for the rows at `positions`; and whether two different ids share one of the keys `suspects`."""
    rows: list[dict[str, Any]] = []
    id_of: dict[int, str] = {}
    refused, suspected = np.zeros(len(keys), bool), contains(suspects, keys)
    refused[positions] = True
    starts = np.cumsum([0, *(row_group.rows for row_group in manifest.row_groups)])
    at = np.unique(np.searchsorted(starts, np.flatnonzero(refused | suspected), side="right") - 1)
    for number in at.tolist():
        row_group = manifest.row_groups[number]
        for read in read_safely(manifest, row_group, columns):
            start = int(starts[number]) + read.first - row_group.first_row
            names = [name for name in manifest.kind.named if name in read.table.column_names]
            for n, row in enumerate(read.table.select(names).to_pylist()):
                position, row_id = start + n, row[manifest.kind.key]
                if suspected[position] and row_id and id_of.setdefault(int(keys[position]), row_id) != row_id:
                    return pa.table({}), True
                if refused[position]:
                    rows.append(_refusal(f"row {read.first + n} of {row_group.path}", row, manifest.kind.key, read, n))
    schema = tables.rejects_schema(*manifest.kind.named)
    return pa.Table.from_pylist(rows, schema=schema), False


def _refusal(where: str, row: dict[str, Any], key: str, read: Rows, number: int) -> dict[str, Any]:
    broken = [name for name, rows in read.not_utf8.items() if rows[number]]
    if broken:
        reason, message = "not_utf8", f"{where}: column {broken[0]!r} holds a string that is not UTF-8"
    elif row[key]:
        reason, message = "duplicate_id", f"{where}: {key} {row[key]!r} stands in an earlier row, which is kept"
    else:
        reason, message = "null_id", f"{where}: no {key}"
    return {**row, key: row[key] or None, "stage": "manifest", "reason": reason, "message": message}


def _by_file(manifest: Manifest, positions: np.ndarray, starts: np.ndarray) -> dict[int, np.ndarray]:
    """Global row positions -> row numbers within each file."""
    result: dict[int, list[int]] = {}
    for position in positions.tolist():
        number = int(np.searchsorted(starts, position, side="right")) - 1
        row_group = manifest.row_groups[number]
        result.setdefault(row_group.file, []).append(position - int(starts[number]) + row_group.first_row)
    return {file: np.array(rows, np.int64) for file, rows in result.items()}


def _digest(keys: np.ndarray, sources: np.ndarray, kept: np.ndarray) -> str:
    mixed = np.sort(
        (keys * np.uint64(0x9E3779B97F4A7C15) ^ sources) * np.uint64(0xBF58476D1CE4E5B9) ^ kept
    )  # wraps around
    return hashlib.sha256(mixed.tobytes()).hexdigest()[:16]


def row_groups_with(manifest: Manifest, scan: RowIndex, keys: np.ndarray) -> list[RowGroup]:
    """The row groups that hold a row of `keys` ((n,) uint64, sorted)."""
    return [
        row_group
        for row_group, mine in zip(manifest.row_groups, scan.row_group_keys, strict=True)
        if len(mine) and contains(keys, mine).any()
    ]


def contains(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """(n,) bool: which of `keys` are in `sorted_keys`."""
    return places(sorted_keys, keys)[1]


def places(sorted_keys: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) int64 where each of `keys` is in `sorted_keys`, and (n,) bool whether it is there; anywhere if not."""
    if not len(sorted_keys):
        return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return at, sorted_keys[at] == keys
