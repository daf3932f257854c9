"""Manifests: making one from a folder of pictures, and reading any Parquet that names pictures.

Rows are known by `image_id`. For counting and filtering an id becomes a 64-bit hash, so that a hundred million rows
need 1.6 GB of driver memory at the most and no strings; the hash's key is chosen so that no two ids of a manifest collide.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from clipray import tables
from clipray.errors import JobError, ManifestError
from clipray.storage import Folder, absolute, filesystem

PICTURE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".jp2",
    ".avif",
    ".ppm",
    ".pgm",
)
SCAN_ROWS = 131_072


@dataclass(frozen=True)
class Piece:
    """A row group of a manifest file: the unit in which a manifest is read."""

    file: int
    path: str
    row_group: int
    first_row: int
    rows: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """An opened manifest: its files, row groups and columns; no rows are read yet."""

    urls: tuple[str, ...]
    pieces: tuple[Piece, ...]
    schema: pa.Schema

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    @property
    def bytes(self) -> int:
        """Uncompressed size of the manifest's columns."""
        return sum(piece.bytes for piece in self.pieces)

    def columns(self, keep: Sequence[str] = ()) -> list[str]:
        """The columns that encoding reads."""
        return [
            "image_id",
            *(c for c in ("uri", "bytes") if c in self.schema.names),
            *(k for k in keep if k not in ("uri", "bytes")),
        ]


def open_manifest(source: str | Sequence[str], keep: Sequence[str] = ()) -> Manifest:
    """Open one Parquet file, a glob, a folder of Parquet, or a list of those, on any fsspec URL.

    Raises:
        ManifestError: nothing there, not Parquet, a column missing or of another type, files that differ.
    """
    urls = [url for one in ([source] if isinstance(source, str) else source) for url in _expand(absolute(one))]
    pieces: list[Piece] = []
    first: pa.Schema | None = None
    for number, url in enumerate(urls):
        schema, metadata = _footer(url)
        _check_columns(url, schema, keep)
        first = first or schema
        for name in ("uri", "bytes", *keep):
            kinds = _type_of(schema, name), _type_of(first, name)
            if kinds[0] != kinds[1] and not (name == "uri" and None not in kinds):  # any kind of string will do
                raise ManifestError(
                    f"{url}: column {name!r} is {_type_of(schema, name)}, but {_type_of(first, name)} in {urls[0]}"
                )
        start = 0
        for group in range(metadata.num_row_groups):
            part = metadata.row_group(group)
            pieces.append(Piece(number, url, group, start, part.num_rows, part.total_byte_size))
            start += part.num_rows
    if first is None:
        raise ManifestError(
            "no manifest named: expected a Parquet file, a glob or a folder of Parquet, or a list of those"
        )
    return Manifest(tuple(urls), tuple(pieces), first)


def _expand(url: str) -> list[str]:
    fs, path = filesystem(url)
    scheme = url.split("://", maxsplit=1)[0] + "://" if "://" in url else ""
    if is_glob(fs, path):
        found = sorted(fs.glob(path))
    elif fs.isdir(path):
        found = sorted(
            p
            for p in fs.find(path)
            if p.endswith((".parquet", ".pq")) and not os.path.basename(p).startswith((".", "_"))
        )
    else:
        found = [path] if fs.exists(path) else []
    if not found:
        raise ManifestError(
            f"{url}: no manifest there: expected a Parquet file, a glob or a folder of Parquet; `clipray manifest DIR OUT.parquet` makes one"
        )
    return [p if not scheme or "://" in p else scheme + p for p in found]


def is_glob(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    """Whether `path` is a pattern; what exists under such a name is that file or folder itself."""
    return any(c in path for c in "*?[") and not fs.exists(path)


def _footer(url: str) -> tuple[pa.Schema, pq.FileMetaData]:
    fs, path = filesystem(url)
    try:
        with fs.open(path, "rb") as file:
            parquet = pq.ParquetFile(file)
            return parquet.schema_arrow, parquet.metadata
    except (pa.ArrowInvalid, OSError) as error:
        raise ManifestError(f"{url}: not a readable Parquet file: {error}") from error


def _type_of(schema: pa.Schema, name: str) -> pa.DataType | None:
    return schema.field(name).type if name in schema.names else None


def _check_columns(url: str, schema: pa.Schema, keep: Sequence[str]) -> None:
    found = ", ".join(schema.names)
    if "image_id" not in schema.names:
        raise ManifestError(f"{url}: no column `image_id`; found: {found}")
    if "uri" not in schema.names and "bytes" not in schema.names:
        raise ManifestError(f"{url}: expected a column `uri` or `bytes`; found: {found}")
    missing = [name for name in keep if name not in schema.names]
    if missing:
        raise ManifestError(f"{url}: `keep` names {missing[0]!r}, which is no column; found: {found}")
    if "bytes" in keep:
        raise ManifestError(f"{url}: `keep` names 'bytes', the pictures themselves, which no table holds")
    for name, accepted in {"image_id": _is_text, "uri": _is_text, "bytes": _is_binary}.items():
        kind = _type_of(schema, name)
        if kind is not None and not accepted(kind):
            wanted = "binary" if name == "bytes" else "string"
            raise ManifestError(
                f"{url}: column `{name}` is {kind}; expected {wanted}: cast it when you write the manifest"
            )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def read_piece(piece: Piece, columns: Sequence[str], rows: int) -> Iterator[tuple[int, pa.Table]]:
    """Stream a row group as (number of the first row in its file, table of at most `rows` rows), URIs resolved."""
    fs, path = filesystem(piece.path)
    start = piece.first_row
    with fs.open(path, "rb") as file:
        for batch in pq.ParquetFile(file).iter_batches(
            batch_size=rows, row_groups=[piece.row_group], columns=list(columns)
        ):
            table = pa.Table.from_batches([batch]).select(list(columns))
            for name in ("image_id", "uri"):
                if name in table.schema.names and table.schema.field(name).type != pa.string():
                    table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(pa.string()))
            if "uri" in table.schema.names:
                uris = pa.array([resolve(uri, piece.path) for uri in table["uri"].to_pylist()], pa.string())
                table = table.set_column(table.schema.get_field_index("uri"), "uri", uris)
            yield start, table
            start += batch.num_rows


def resolve(uri: str | None, manifest: str) -> str | None:
    """`uri` as an absolute path or URL: a relative one stands against the manifest's folder."""
    if not uri or "://" in uri or uri.startswith("/"):
        return uri
    return f"{manifest.rsplit('/', 1)[0]}/{uri}"


@dataclass(frozen=True)
class Scan:
    """What the driver knows of every row before work starts.

    Attributes:
        keys: (n,) uint64, hash of each accepted row's id, sorted.
        uris, kept: (n,) uint64, hashes of its `uri` and of its kept columns, in the order of `keys`.
        salt: the key of the hash, chosen so that `keys` are unique.
        digest: digest of all rows, whatever their order and files.
        refused: file number -> sorted row numbers that are no work: null ids, repeated ids.
        rejects: one row per refused row, in the schema of `rejects`.
        piece_keys: the keys of each piece's accepted rows; see `pieces_with`.
    """

    rows: int
    keys: np.ndarray
    uris: np.ndarray
    kept: np.ndarray
    salt: str
    digest: str
    refused: dict[int, np.ndarray]
    rejects: pa.Table
    piece_keys: list[np.ndarray] = field(repr=False, default_factory=list)


def row_keys(table: pa.Table, salt: str, keep: Sequence[str] = ()) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) uint64 hashes of a table's rows: of `image_id`, of `uri` (resolved), of the kept columns."""
    keys = hash_strings(table["image_id"], salt)
    uris = (
        hash_strings(table["uri"], salt)
        if "uri" in table.column_names
        else hash_strings(pa.nulls(len(table), pa.string()), salt)
    )
    kept = np.zeros(len(keys), np.uint64)
    for name in keep:
        values = (
            table[name]
            if _is_text(table.schema.field(name).type)
            else pa.array([repr(v) for v in table[name].to_pylist()], pa.string())
        )
        kept = kept * np.uint64(1_099_511_628_211) + hash_strings(values, salt)
    return keys, uris, kept


def hash_strings(column: pa.ChunkedArray | pa.Array, salt: str) -> np.ndarray:
    """(n,) uint64 keyed hash (SipHash) of a string column, the same on every machine and version."""
    if pa.types.is_dictionary(column.type):  # whose nulls `to_numpy` would show as a category
        column = column.cast(pa.string())
    values = np.asarray(
        column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy(), dtype=object
    )
    values[pd.isna(values)] = "\0null"
    return pd.util.hash_array(values, hash_key=salt, categorize=False)


def scan(manifest: Manifest, keep: Sequence[str] = ()) -> Scan:
    """Read ids, URIs and kept columns of the whole manifest: find null and repeated ids, hash the rest.

    Of rows with the same id the first is kept; the others become rejects.
    """
    for attempt in range(8):
        found = _scan(manifest, keep, f"clipray-{attempt:08d}")
        if found is not None:
            return found
    raise ManifestError("image ids collide under every hash key tried; are they adversarial?")  # practically impossible


def _scan(manifest: Manifest, keep: Sequence[str], salt: str) -> Scan | None:
    columns = [c for c in manifest.columns(keep) if c != "bytes"]
    columns_of: list[list[np.ndarray]] = []
    for piece in manifest.pieces:
        for _, table in _read_safely(piece, columns):
            columns_of.append([*row_keys(table, salt, keep), _null_ids(table)])
    empty = np.zeros(0, np.uint64)
    keys, uris, kept, null = (
        (np.concatenate([empty, *parts]) for parts in zip(*columns_of)) if columns_of else (empty,) * 4
    )
    null = null.astype(bool)
    repeated = _repeats(keys, ~null)
    positions = np.flatnonzero(null | repeated)
    rejects, collided = _refused_rows(manifest, positions, null, keys, columns)
    if collided:
        return None
    accepted = np.ones(len(keys), bool)
    accepted[positions] = False
    starts = np.cumsum([0, *(piece.rows for piece in manifest.pieces)])
    pieces = [keys[a:b][accepted[a:b]] for a, b in itertools.pairwise(starts)]
    order = np.argsort(keys[accepted], kind="stable")
    return Scan(
        rows=len(keys),
        keys=keys[accepted][order],
        uris=uris[accepted][order],
        kept=kept[accepted][order],
        salt=salt,
        digest=_digest(keys, uris, kept),
        refused=_by_file(manifest, positions, starts),
        rejects=rejects,
        piece_keys=pieces,
    )


def _read_safely(piece: Piece, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    try:
        yield from read_piece(piece, columns, SCAN_ROWS)
    except (pa.ArrowInvalid, OSError) as error:
        raise ManifestError(f"{piece.path}: row group {piece.row_group} cannot be read: {error}") from error


def _null_ids(table: pa.Table) -> np.ndarray:
    ids = table["image_id"].to_numpy()
    return np.array([not value for value in ids], bool)  # an empty string is no identity either


def _repeats(keys: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """(n,) bool: rows whose key stood in an earlier usable row."""
    repeated = np.zeros(len(keys), bool)
    rows = np.flatnonzero(usable)
    order = rows[np.argsort(keys[rows], kind="stable")]
    repeated[order[1:][keys[order[1:]] == keys[order[:-1]]]] = True
    return repeated


def _refused_rows(
    manifest: Manifest, positions: np.ndarray, null: np.ndarray, keys: np.ndarray, columns: list[str]
) -> tuple[pa.Table, bool]:
    """The rejects for the refused rows; and whether two different ids share a key."""
    rows: list[dict[str, Any]] = []
    suspects = set(keys[positions[~null[positions]]].tolist())
    id_of: dict[int, str] = {}
    start = 0
    for piece in manifest.pieces:
        inside = np.arange(start, start + piece.rows)
        here = set(positions[(positions >= start) & (positions < start + piece.rows)].tolist())
        if here or (suspects and np.isin(keys[inside], list(suspects)).any()):
            for row_in_file, table in _read_safely(piece, columns):
                offset = start + row_in_file - piece.first_row
                for n, (image_id, uri) in enumerate(_pairs(table)):
                    position, key = offset + n, int(keys[offset + n])
                    if key in suspects and image_id and id_of.setdefault(key, image_id) != image_id:
                        return pa.table({}), True
                    if position in here:
                        rows.append(_refusal(piece, row_in_file + n, image_id, uri))
        start += piece.rows
    return pa.Table.from_pylist(rows, schema=tables.arrow_schema("rejects")), False


def _pairs(table: pa.Table) -> Iterator[tuple[str | None, str | None]]:
    uris = table["uri"].to_pylist() if "uri" in table.schema.names else [None] * len(table)
    return zip(table["image_id"].to_pylist(), uris, strict=True)


def _refusal(piece: Piece, row: int, image_id: str | None, uri: str | None) -> dict[str, Any]:
    where = f"row {row} of {piece.path}"
    reason, message = (
        ("duplicate_id", f"{where}: image_id {image_id!r} stands in an earlier row, which is kept")
        if image_id
        else ("null_id", f"{where}: no image_id")
    )
    return {"image_id": image_id or None, "uri": uri, "stage": "manifest", "reason": reason, "message": message}


def _by_file(manifest: Manifest, positions: np.ndarray, starts: np.ndarray) -> dict[int, np.ndarray]:
    """Global row positions -> row numbers within each file."""
    result: dict[int, list[int]] = {}
    for position in positions.tolist():
        number = int(np.searchsorted(starts, position, side="right")) - 1
        piece = manifest.pieces[number]
        result.setdefault(piece.file, []).append(position - int(starts[number]) + piece.first_row)
    return {file: np.array(rows, np.int64) for file, rows in result.items()}


def _digest(keys: np.ndarray, uris: np.ndarray, kept: np.ndarray) -> str:
    mixed = np.sort(
        (keys * np.uint64(0x9E3779B97F4A7C15) ^ uris) * np.uint64(0xBF58476D1CE4E5B9) ^ kept
    )  # wraps around
    return hashlib.sha256(mixed.tobytes()).hexdigest()[:16]


def pieces_with(manifest: Manifest, scan: Scan, keys: np.ndarray) -> list[Piece]:
    """The row groups that hold a row of `keys` ((n,) uint64, sorted)."""
    return [
        piece
        for piece, mine in zip(manifest.pieces, scan.piece_keys, strict=True)
        if len(mine) and contains(keys, mine).any()
    ]


def contains(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """(n,) bool: which of `keys` are in `sorted_keys`."""
    if not len(sorted_keys):
        return np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return sorted_keys[at] == keys


def make_manifest(source: str, out: str, *, label: Literal["folder"] | str | None = None) -> int:
    """Write a manifest of the pictures under a folder or glob (local or any fsspec URL), sorted by path.

    Args:
        source: a folder (searched recursively by file name suffix) or a glob.
        out: the Parquet file to write, with columns `image_id` (path relative to the folder, or to the glob's fixed
            part), `uri`, and `label` when asked for.
        label: `folder` takes the name of the picture's folder; anything else is a regular expression searched in
            `image_id`: its first group (or whole match) is the label; no match is null.

    Returns:
        The number of pictures.

    Raises:
        ManifestError: no pictures there.
        JobError: `label` is no regular expression.
    """
    pattern = _label_pattern(label)
    root, paths = find_pictures(source)
    ids = [os.path.relpath(path, root) for path in paths]
    out = absolute(out)
    columns: dict[str, Any] = {
        "image_id": pa.array(ids, pa.string()),
        "uri": pa.array([_uri(source, path, out) for path in paths], pa.string()),
    }
    if label == "folder":
        columns["label"] = pa.array([os.path.basename(os.path.dirname(path)) for path in paths], pa.string())
    elif pattern:
        found = [pattern.search(image_id) for image_id in ids]
        columns["label"] = pa.array([m and (m.group(1) if m.re.groups else m.group(0)) for m in found], pa.string())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd", row_group_size=65_536)
    folder, name = out.rsplit("/", 1)
    Folder(folder).write(name, sink.getvalue().to_pybytes())
    return len(ids)


def find_pictures(source: str) -> tuple[str, list[str]]:
    """(root, sorted paths) of the pictures under a folder or glob, as paths of its filesystem."""
    fs, path = filesystem(source)
    if is_glob(fs, path):
        fixed = re.split(r"[*?\[]", path)[0]
        root = fixed.rsplit("/", 1)[0] or "/"
        found = [p for p in fs.glob(path) if p.lower().endswith(PICTURE_SUFFIXES)]
    else:
        root = path.rstrip("/")
        found = [p for p in fs.find(path) if p.lower().endswith(PICTURE_SUFFIXES)] if fs.isdir(path) else []
    if not found:
        raise ManifestError(
            f"{source}: no pictures there: expected a folder or glob of files named {', '.join(PICTURE_SUFFIXES[:6])} …"
        )
    return root, sorted(found)


def _uri(source: str, path: str, out: str) -> str:
    """Relative to the manifest when the picture lies under its folder, so that both can move together; else absolute."""
    if "://" in source and not source.startswith("file://"):
        return path if "://" in path else f"{source.split('://', maxsplit=1)[0]}://{path}"
    home = out.rsplit("/", 1)[0] + "/"
    return path.removeprefix(home) if "://" not in out else path


def _label_pattern(label: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(label) if label and label != "folder" else None
    except re.error as error:
        raise JobError(f"--label {label!r}: expected `folder` or a regular expression: {error}") from error
