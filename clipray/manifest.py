"""Manifests: any Parquet that names pictures or holds texts, opened, checked and read; and made from a folder of pictures."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from clipray.environment import environment_errors
from clipray.errors import JobError, ManifestError
from clipray.kinds import PICTURES, Kind
from clipray.parquet import open_parquet
from clipray.storage import Folder, absolute, explained, filesystem
from clipray.uris import is_local, is_relative

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
    kind: Kind = PICTURES

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    @property
    def bytes(self) -> int:
        """Uncompressed size of the manifest's columns."""
        return sum(piece.bytes for piece in self.pieces)

    def columns(self, keep: Sequence[str] = ()) -> list[str]:
        """The columns that encoding reads."""
        content = self.kind.content
        return [self.kind.key, *(c for c in content if c in self.schema.names), *(k for k in keep if k not in content)]


def open_manifest(
    source: str | Sequence[str], keep: Sequence[str] = (), also: Sequence[str] = (), kind: Kind = PICTURES
) -> Manifest:
    """Open one Parquet file, a glob, a folder of Parquet, or a list of those, on any fsspec URL.

    `keep`: columns that must be there. `also`: columns that are in all files or in none. `kind`: what its rows are.

    Raises:
        ManifestError: nothing there, not Parquet, a column missing or of another type, files that differ.
    """
    urls = [url for one in ([source] if isinstance(source, str) else source) for url in expand_parquet(absolute(one))]
    pieces: list[Piece] = []
    first: pa.Schema | None = None
    for number, url in enumerate(urls):
        schema, metadata = read_footer(url)
        _check_columns(url, schema, keep, kind)
        first = first or schema
        for name in (*kind.content, *keep, *also):
            types = _type_of(schema, name), _type_of(first, name)
            if types[0] != types[1] and not (name in kind.sources and None not in types):  # any kind of string will do
                raise ManifestError(
                    f"{url}: column {name!r} is {types[0] or 'missing'}, but {types[1] or 'missing'} in {urls[0]}"
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
    return Manifest(tuple(urls), tuple(pieces), first, kind)


def expand_parquet(url: str) -> list[str]:
    """The Parquet files at a file's, glob's or folder's URL. Raises ManifestError where there are none."""
    with explained(url):
        return _expand_parquet(url)


def _expand_parquet(url: str) -> list[str]:
    fs, path = filesystem(url)
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
    return [_as_url(p, url) for p in found]


def _as_url(path: str, source: str) -> str:
    """A path of the filesystem of `source` as a path or URL by itself."""
    return path if is_local(source) or "://" in path else f"{absolute(source).partition('://')[0]}://{path}"


def is_glob(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    """Whether `path` is a pattern; what exists under such a name is that file or folder itself."""
    return any(c in path for c in "*?[") and not fs.exists(path)


def read_footer(url: str) -> tuple[pa.Schema, pq.FileMetaData]:
    """Schema and metadata of a Parquet file. Raises ManifestError where it is none."""
    try:
        with explained(url), open_parquet(url) as parquet:
            return parquet.schema, parquet.metadata
    except (pa.ArrowInvalid, OSError) as error:
        raise ManifestError(f"{url}: not a readable Parquet file: {error}") from error


def _type_of(schema: pa.Schema, name: str) -> pa.DataType | None:
    return schema.field(name).type if name in schema.names else None


def _check_columns(url: str, schema: pa.Schema, keep: Sequence[str], kind: Kind) -> None:
    found = ", ".join(schema.names)
    if kind.key not in schema.names and not kind.derived:
        raise ManifestError(f"{url}: no column `{kind.key}`; found: {found}")
    there = [c in schema.names for c in kind.content]
    if not (any(there) if kind.inline else all(there)):
        wanted = (" or " if kind.inline else " and ").join(f"`{c}`" for c in kind.content)
        raise ManifestError(f"{url}: expected a column {wanted}; found: {found}")
    missing = [name for name in keep if name not in schema.names]
    if missing:
        raise ManifestError(f"{url}: `keep` names {missing[0]!r}, which is no column; found: {found}")
    if kind.inline in keep:
        raise ManifestError(f"{url}: `keep` names {kind.inline!r}, the pictures themselves, which no table holds")
    for name in (kind.key, *kind.content):
        here = _type_of(schema, name)
        if here is not None and not (_is_binary if name == kind.inline else is_text)(here):
            wanted = "binary" if name == kind.inline else "string"
            raise ManifestError(
                f"{url}: column `{name}` is {here}; expected {wanted}: cast it when you write the manifest"
            )


def check_boxes(manifest: Manifest) -> None:
    """Raises ManifestError where the column `boxes` holds no lists of lists of numbers."""
    kind = manifest.schema.field("boxes").type
    inner = kind.value_type if _is_list(kind) else None
    number = inner.value_type if inner is not None and _is_list(inner) else None
    if number is None or not (pa.types.is_floating(number) or pa.types.is_integer(number)):
        raise ManifestError(
            f"{manifest.urls[0]}: column `boxes` is {kind}; expected list<list<float>>: for each picture a list of [x1, y1, x2, y2] in px"
        )


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def is_texts(kind: pa.DataType) -> bool:
    """Whether it is lists of strings."""
    return _is_list(kind) and is_text(kind.value_type)


def is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def read_piece(
    piece: Piece, columns: Sequence[str], rows: int, kind: Kind = PICTURES
) -> Iterator[tuple[int, pa.Table]]:
    """Stream a row group as (number of the first row in its file, table of at most `rows` rows).

    Identities and sources come as plain strings, the URIs of pictures resolved.
    """
    start = piece.first_row
    with open_parquet(piece.path) as parquet:
        made = kind.derived and kind.key in columns and kind.key not in parquet.schema.names
        read = [name for name in columns if name != kind.key] if made else list(columns)
        for batch in parquet.iter_batches(rows, [piece.row_group], read):
            table = pa.Table.from_batches([batch]).select(read)
            if made:
                table = table.append_column(kind.key, _derived_ids(table, kind)).select(list(columns))
            for name in kind.named:
                if name in table.schema.names and table.schema.field(name).type != pa.string():
                    table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(pa.string()))
            if "uri" in kind.sources and "uri" in table.schema.names:
                uris = pa.array([resolve(uri, piece.path) for uri in table["uri"].to_pylist()], pa.string())
                table = table.set_column(table.schema.get_field_index("uri"), "uri", uris)
            yield start, table
            start += batch.num_rows


def _derived_ids(table: pa.Table, kind: Kind) -> pa.Array:
    """Identities made of the rows' sources: 16 hex digits each."""
    rows = zip(*(table[name].to_pylist() for name in kind.sources), strict=True)
    texts = (json.dumps(row, ensure_ascii=False) for row in rows)
    return pa.array([hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts], pa.string())


def resolve(uri: str | None, manifest: str) -> str | None:
    """`uri` as an absolute path or URL: a relative one stands against the manifest's folder."""
    return f"{manifest.rsplit('/', 1)[0]}/{uri}" if uri and is_relative(uri) else uri


@environment_errors()
def make_manifest(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, label: Literal["folder"] | str | None = None
) -> int:
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
    source, out = os.fspath(source), os.fspath(out)
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
    beside = path.removeprefix(out.rsplit("/", 1)[0] + "/")
    if not is_local(source) or not is_local(out) or resolve(beside, out) != path:
        return _as_url(path, source)
    return beside


def _label_pattern(label: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(label) if label and label != "folder" else None
    except re.error as error:
        raise JobError(f"--label {label!r}: expected `folder` or a regular expression: {error}") from error
