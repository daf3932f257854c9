"""Manifests: opens, checks and reads any Parquet of images or texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from clipray.errors import ManifestError
from clipray.inputs.layout import STATUS, WHY, Layout, layout_of
from clipray.inputs.parquet_files import (
    IDS,
    File,
    as_utf8,
    common_type,
    expand_parquet,
    int96_as_before,
    is_binary,
    is_id,
    is_list_type,
    is_text,
    read_footer,
    rows_not_utf8,
    with_rows,
    with_uuids_as_text,
)
from clipray.job import ManifestColumns
from clipray.job.row_spec import IMAGES, RowSpec
from clipray.storage.folder import absolute
from clipray.storage.parquet import RowGroup
from clipray.storage.uris import is_relative
from clipray.tables import unwritable

CAST = "cast it when you write the manifest"


@dataclass(frozen=True)
class Manifest:
    """An opened manifest: its files, row groups and columns; no rows are read yet."""

    urls: tuple[str, ...]
    row_groups: tuple[RowGroup, ...]
    schema: pa.Schema
    layout: Layout = field(default_factory=Layout)

    @property
    def spec(self) -> RowSpec:
        return self.layout.spec

    @property
    def rows(self) -> int:
        return sum(row_group.rows for row_group in self.row_groups)

    @property
    def bytes(self) -> int:
        """Uncompressed size of the manifest's columns."""
        return sum(row_group.bytes for row_group in self.row_groups)

    def columns(self, keep: Sequence[str] = ()) -> list[str]:
        """The columns that encoding reads."""
        content = self.spec.content
        read = (c for c in (*content, self.layout.version) if c in self.schema.names)
        return list(dict.fromkeys([self.spec.key, *read, *(k for k in keep if k not in content)]))

    @property
    def download_columns(self) -> list[str]:
        """The columns that say whether a row was downloaded, and why not."""
        return [c for c in (STATUS, WHY) if c in self.schema.names] if STATUS in self.layout.columns else []

    def has(self, name: str, fits: Callable[[pa.DataType], bool], expected: str) -> bool:
        """Whether there is a column. Raises ManifestError where its type does not fit."""
        if name not in self.schema.names:
            return False
        column_type = self.schema.field(name).type
        if not fits(column_type):
            raise ManifestError(f"{self.urls[0]}: column `{name}` is {column_type}; expected {expected}")
        return True


def open_manifest(
    source: str | Sequence[str] | ManifestColumns,
    keep: Sequence[str] = (),
    also: Sequence[str] = (),
    spec: RowSpec = IMAGES,
) -> Manifest:
    """Open one Parquet file, a glob, a folder of Parquet, or a list of those, on any fsspec URL.

    Args:
        source: where the Parquet lies, and, where its columns have other names than a manifest's, how they are called.
        keep: columns that must be there.
        also: columns that are in all files or in none.
        spec: what its rows are.

    Raises:
        ManifestError: nothing there, not Parquet, a column missing, there twice or of another type, files that differ.
    """
    columns = source if isinstance(source, ManifestColumns) else None
    paths = source.paths if isinstance(source, ManifestColumns) else source
    paths = [absolute(one) for one in ([paths] if isinstance(paths, str) else paths)]
    urls = [url for one in paths for url in expand_parquet(one)]
    if not urls:
        raise ManifestError(
            "no manifest named: expected a Parquet file, a glob or a folder of Parquet, or a list of those"
        )
    files = [read_footer(url) for url in urls]
    layout = layout_of(spec, columns, with_rows(files), [_root(one, urls) for one in paths])
    views = [layout.view(file) for file in with_rows(files)]
    for view in views:
        _check_columns(view, keep, also, spec)
    schema = _common_schema(views, dict.fromkeys((*spec.content, *keep, *also)))
    for name in keep:
        if reason := unwritable(schema.field(name)):
            raise ManifestError(f"{urls[0]}: `keep` names {name!r}, {schema.field(name).type}: {reason}")
    row_groups = [
        replace(row_group, file=number)
        for number, file in enumerate(files)
        for row_group in file.row_groups
        if row_group.rows
    ]
    return Manifest(tuple(urls), tuple(row_groups), schema, layout)


def _root(source: str, urls: Sequence[str]) -> str:
    """The folder of a file, a folder itself, or the fixed part of a glob."""
    if source in urls:
        return source.rpartition("/")[0]
    parts = source.rstrip("/").split("/")
    fixed = next((n for n, part in enumerate(parts) if set(part) & set("*?[{")), len(parts))
    return "/".join(parts[:fixed])


def _common_schema(files: Sequence[File], names: Iterable[str]) -> pa.Schema:
    """The schema of the first file; these columns get the types that can hold the values of all files."""
    schema = files[0].schema
    for name in names:
        types = [file.type_of(name) for file in files]
        there = [one for one in types if one is not None]
        common = common_type(there) if there else None
        odd = next((n for n, one in enumerate(types) if one != types[0]), 0)
        if there and (common is None or len(there) < len(types)):
            raise ManifestError(
                f"{files[odd].url}: column {name!r} is {types[odd] or 'missing'}, but {types[0] or 'missing'} in {files[0].url}"
            )
        if common is not None:
            at = schema.get_field_index(name)
            schema = schema.set(at, schema.field(at).with_type(int96_as_before(files, name, common)))
    return schema


def _check_columns(file: File, keep: Sequence[str], also: Sequence[str], spec: RowSpec) -> None:
    url, names = file.url, file.schema.names
    file.refuse_without(
        [name for name in (spec.key, *spec.content, *keep, *also) if name in names], error=ManifestError
    )
    if not spec.derived and (reason := file.without(spec.key)):
        hint = f"; name it in `manifest: {{path: …, {spec.key}: COLUMN}}`, or have it made: `{spec.key}: {{from: row}}`"
        raise ManifestError(f"{url}: {reason}{hint if spec.key not in names else ''}")
    missing = [c for c in spec.content if c not in names]
    if len(missing) == len(spec.content) or (missing and not spec.inline):
        wanted = (" or " if spec.inline else " and ").join(f"`{c}`" for c in spec.content)
        hint = f"; name it in `manifest: {{path: …, {missing[0]}: COLUMN}}`" if missing[0] not in names else ""
        raise ManifestError(f"{url}: expected a column {wanted}: {file.without(missing[0])}{hint}")
    file.refuse_without(keep, "`keep`: ", ManifestError)
    if spec.inline in keep:
        raise ManifestError(f"{url}: `keep` names {spec.inline!r}, the images themselves, which no table holds")
    for name in (spec.key, *spec.content):
        column_type = file.type_of(name) or pa.null()
        fits, wanted = (is_binary, "binary") if name == spec.inline else (is_text, "string")
        if name in spec.ids:
            fits, wanted = is_id, IDS
        if not (pa.types.is_null(column_type) or fits(column_type)):
            raise ManifestError(f"{url}: column `{name}` is {column_type}; expected {wanted}: {CAST}")


def has_boxes(manifest: Manifest) -> bool:
    """Whether there is a column `boxes`. Raises ManifestError: it does not hold lists of lists of numbers."""
    return manifest.has("boxes", _is_boxes, "list<list<float>>: for each image a list of [x1, y1, x2, y2] in px")


def _is_boxes(arrow_type: pa.DataType) -> bool:
    inner = arrow_type.value_type if is_list_type(arrow_type) else pa.null()
    number = inner.value_type if is_list_type(inner) else pa.null()
    return bool(pa.types.is_floating(number) or pa.types.is_integer(number))


def is_texts(arrow_type: pa.DataType) -> bool:
    """Whether it is lists of strings."""
    return is_list_type(arrow_type) and is_text(arrow_type.value_type)


@dataclass(frozen=True)
class Rows:
    """Neighbouring rows of a manifest file.

    Attributes:
        first: number of the first row in its file.
        table: the columns that were asked for. Identities and sources are plain strings, URIs of images resolved.
        not_utf8: column -> (n,) bool, the rows whose string there is not UTF-8. Columns without such rows are left out.
    """

    first: int
    table: pa.Table
    not_utf8: Mapping[str, np.ndarray]

    @property
    def numbers(self) -> np.ndarray:
        """(n,) int64: number of each row in its file."""
        return np.arange(self.first, self.first + len(self.table))


def read_rows(
    row_group: RowGroup,
    columns: Sequence[str],
    rows: int,
    layout: Layout | None = None,
    schema: pa.Schema | None = None,
) -> Iterator[Rows]:
    """Stream a row group of a manifest, at most `rows` rows at once.

    Args:
        layout: the manifest's; by default that of images.
        schema: the manifest's, whose types the columns get; None leaves them as the file has them.

    Raises:
        OSError, pyarrow.ArrowInvalid: the file is not whole, or a value does not fit its column's type.
    """
    layout = layout or Layout()
    for first, stored in layout.stream(row_group, columns, rows):
        table, not_utf8 = _readable(stored, columns, layout.spec, schema)
        if "uri" in layout.spec.sources and "uri" in columns:
            uris = pa.array([resolve(uri, row_group.path) for uri in table["uri"].to_pylist()], pa.string())
            table = table.set_column(table.schema.get_field_index("uri"), "uri", uris)
        yield Rows(first, table, not_utf8)


def _readable(
    stored: pa.Table, columns: Sequence[str], spec: RowSpec, schema: pa.Schema | None
) -> tuple[pa.Table, dict[str, np.ndarray]]:
    """These columns in their final types and in UTF-8, with derived ids if none are stored; and which rows were not UTF-8."""
    derived = spec.derived and spec.key in columns and spec.key not in stored.column_names
    table, not_utf8 = stored.select([name for name in columns if not (derived and name == spec.key)]), {}
    types = {} if schema is None else dict(zip(schema.names, schema.types, strict=True))
    for at, name in enumerate(table.schema.names):
        column = with_uuids_as_text(table[name]) if name in spec.ids else table[name]
        wanted = pa.string() if name in (*spec.named, *spec.ids) else types.get(name, column.type)
        if is_text(column.type):
            texts, broken = as_utf8(column)
            column = texts if broken.any() or wanted == pa.string() else column
        else:
            broken = rows_not_utf8(column)
        if broken.any():
            not_utf8[name] = broken
        if table[name].type != wanted or column is not table[name]:
            table = table.set_column(at, name, column.cast(wanted))
    if derived:
        table = table.append_column(spec.key, _derived_ids(table, spec)).select(list(columns))
    return table, not_utf8


def _derived_ids(table: pa.Table, spec: RowSpec) -> pa.Array:
    """Ids made from the rows' sources: 16 hex digits each."""
    rows = zip(*(table[name].to_pylist() for name in spec.sources), strict=True)
    texts = (json.dumps(row, ensure_ascii=False) for row in rows)
    return pa.array([hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts], pa.string())


def resolve(uri: str | None, manifest: str) -> str | None:
    """`uri` as an absolute path or URL: a relative one is relative to the manifest's folder."""
    return f"{manifest.rsplit('/', 1)[0]}/{uri}" if uri and is_relative(uri) else uri
