"""How the columns of other people's Parquet become those of a manifest: by name, nested by dots, or made."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from clipray.errors import ManifestError, no_such
from clipray.inputs.image_listing import utf8_name
from clipray.inputs.parquet_files import File, is_binary, is_text
from clipray.job import ManifestColumns
from clipray.job.row_spec import IMAGES, RowSpec
from clipray.storage.parquet import RowGroup

OFFSET, SIZE = "offset", "size"  # in bytes, of what a row has of the file at its `uri`
VERSION = "version"  # of that file
STATUS, WHY = "status", "error_message"  # of a download, as img2dataset writes them
SUCCESS = "success"
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_HIVE_KEY = re.compile(r"([^/=]+)=([^/]*)/")
_SUFFIX = re.compile(r"\.(parquet|pq)$")


@dataclass(frozen=True)
class Layout:
    """How the files of a manifest hold its rows. It travels to all who read them.

    A column of the manifest is the file's of the same name, unless `columns` names another one. A folder `key=value`
    above a file is a column of strings. Where the files have `offset` and `size`, a row's `uri` is a part of a file:
    `URI#bytes=FIRST-LAST`.

    Attributes:
        spec: what the rows are.
        columns: name in the manifest -> name in the files, nested by dots.
        made_id: ids are made: of the file's name and the row's `row` number in it, or of the bytes' `content`.
        roots: folders (paths or URLs), within which the files' names are parts of made ids.
        image: the column of structs of `bytes` and `path`, as Hugging Face writes images; its path is the `uri` where
            there are no bytes.
        ranged: the files have `offset` and `size`.
        version: the column with the version of the file at `uri`, which changes with its contents; "" where there is none.
    """

    spec: RowSpec = IMAGES
    columns: Mapping[str, str] = field(default_factory=dict)
    made_id: Literal["", "row", "content"] = ""
    roots: tuple[str, ...] = ()
    image: str = ""
    ranged: bool = False
    version: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        """What differs from a plain manifest, as JSON values; see `of_facts`."""
        plain = asdict(Layout(self.spec))
        return {name: value for name, value in asdict(self).items() if value != plain[name]}

    @staticmethod
    def of_facts(facts: Mapping[str, Any], spec: RowSpec = IMAGES) -> Layout:
        return Layout(spec, **{**facts, "roots": tuple(facts.get("roots", ()))})

    @property
    def reads_content(self) -> bool:
        """Whether ids cannot be had without the rows' bytes."""
        return self.made_id == "content"

    @property
    def excused(self) -> frozenset[str]:
        """Reasons of rejects that are no fault of the manifest, and so do not count towards `max_reject_rate`."""
        return frozenset({"not_downloaded", *(["duplicate_id"] if self.reads_content else [])})

    def view(self, file: File) -> File:
        """The file with the columns that the manifest has. Raises ManifestError: one that it names is not there."""
        fields = {name: pa.field(name, _type_at(file, name, path)) for name, path in self.columns.items()}
        if self.image:
            fields["uri"] = pa.field("uri", pa.string())
        if self.made_id:
            fields[self.spec.key] = pa.field(self.spec.key, pa.string())
        stored = [one for one in file.schema if one.name not in fields]
        keys = set(hive_keys(file.url)) - set(file.schema.names) - set(fields)
        return replace(
            file, schema=pa.schema([*fields.values(), *stored, *(pa.field(k, pa.string()) for k in sorted(keys))])
        )

    def stream(self, row_group: RowGroup, names: Sequence[str], rows: int) -> Iterator[tuple[int, pa.Table]]:
        """These columns of a row group, at most `rows` rows at once, each part with the number of its first row.

        Columns that the file does not have are left out.
        """
        without_bytes = self.image and row_group.has_no_nulls(f"{self.image}.bytes")
        stored = list(dict.fromkeys(path for name in names for path in self._stored(name, uris=not without_bytes)))
        first = row_group.first_row
        for part in row_group.stream(stored, rows) if stored else _nothing(row_group.rows, rows):
            yield first, self._rows(part, row_group, names, first)
            first += len(part)

    def _stored(self, name: str, *, uris: bool) -> list[str]:
        """The columns of the file that make a column of the manifest. uris: some rows of images have a path."""
        if name == self.spec.key and self.made_id:
            return [self._path("bytes")] if self.reads_content else []
        if name == "uri" and self.image:
            return [self._path("bytes"), f"{self.image}.path"] if uris else []
        if name == "uri" and self.ranged:
            return [self._path(one) for one in (name, OFFSET, SIZE)]
        return [self._path(name)]

    def _path(self, name: str) -> str:
        return self.columns.get(name, name)

    def _rows(self, part: pa.Table, row_group: RowGroup, names: Sequence[str], first: int) -> pa.Table:
        keys = hive_keys(row_group.path)
        columns: dict[str, pa.ChunkedArray | pa.Array] = {}
        for name in names:
            if name == self.spec.key and self.made_id:
                columns[name] = self._ids(part, row_group, first)
            elif name == "uri" and self.image:
                columns[name] = self._paths(part)
            elif (column := _column_at(part, self._path(name))) is not None:
                columns[name] = column
            elif self._path(name) in keys:
                columns[name] = pa.repeat(pa.scalar(keys[self._path(name)], pa.string()), len(part))
            if name == "uri" and self.ranged:
                columns[name] = _part_of(columns[name], *(_column_at(part, self._path(one)) for one in (OFFSET, SIZE)))
        return pa.table(columns)

    def _ids(self, part: pa.Table, row_group: RowGroup, first: int) -> pa.ChunkedArray | pa.Array:
        if self.reads_content:
            values = _column_at(part, self._path("bytes"))
            hashes = [hashlib.sha256(v.as_buffer()).hexdigest() if v.is_valid else None for v in values or ()]
            return pa.array(hashes, pa.string())
        numbers = pc.cast(pa.array(range(first, first + len(part)), pa.int64()), pa.string())
        return pc.binary_join_element_wise(self.name_of(row_group.path), numbers, "/")

    def _paths(self, part: pa.Table) -> pa.ChunkedArray | pa.Array:
        """The paths of images without bytes."""
        paths, data = (_column_at(part, f"{self.image}.{name}") for name in ("path", "bytes"))
        if paths is None or data is None or pa.types.is_null(paths.type):
            return pa.nulls(len(part), pa.string())
        return pc.if_else(data.is_null(), paths.cast(pa.string()), pa.scalar(None, pa.string()))

    def name_of(self, url: str) -> str:
        """A file's name in made ids: its path within the root, without `.parquet`."""
        within = [url.removeprefix(f"{root}/") for root in self.roots if url.startswith(f"{root}/")]
        return utf8_name(_SUFFIX.sub("", min(within, key=len, default=url.rpartition("/")[2])))


def layout_of(spec: RowSpec, source: ManifestColumns | None, files: Sequence[File], roots: Sequence[str]) -> Layout:
    """The layout of files whose columns are called as `source` says, or, where it is None, as those of a manifest.

    An image as Hugging Face writes it, a struct of `bytes` and `path`, is recognised where it is the only one and there is
    no `uri` and no `bytes`. Its rows have ids made of file and row, unless there are ids.

    Raises:
        ManifestError: an id from something else than rows or contents, several columns of images, two files of one name in
            made ids, or an offset without a size.
    """
    columns = dict(source.columns) if source else {}
    made_ids = dict(source.made_ids) if source else {}
    names = set(files[0].schema.names)
    if wrong := sorted(set(made_ids) - {spec.key}):
        raise ManifestError(f"manifest: {wrong[0]}: only ids are made `from` something; expected the name of a column")
    made_id: Literal["", "row", "content"] = made_ids.get(spec.key, "")
    if made_id == "content" and not spec.inline:
        raise ManifestError(f"manifest: {spec.key}: `from: content` needs rows with bytes, which {spec.table} have not")
    image = _image_column(spec, columns, files[0])
    if made_id == "content" and not image and "bytes" not in {*columns, *names}:
        raise ManifestError(
            f"{files[0].url}: {spec.key}: `from: content` needs a column `bytes`, found: {', '.join(sorted(names))}; "
            "name it (`bytes: COLUMN`), or take `from: row`"
        )
    if image:
        columns.setdefault("bytes", f"{image}.bytes")
        made_id = made_id or ("" if {spec.key} & (set(columns) | names) else "row")
    ranged = "uri" in spec.sources and _is_ranged(columns, files[0])
    version = VERSION if VERSION in columns else ""
    layout = Layout(spec, columns, made_id, tuple(roots) if made_id == "row" else (), image, ranged, version)
    if made_id == "row":
        _check_names(layout, files)
    return layout


def _is_ranged(columns: Mapping[str, str], file: File) -> bool:
    """Whether rows are parts of files. Raises ManifestError: the job names an offset or a size, and they are not both numbers."""
    named = [name for name in (OFFSET, SIZE) if name in columns]
    for name in (OFFSET, SIZE):
        path = columns.get(name, name)
        arrow_type = _type_at(file, name, path) if name in columns else file.type_of(path)
        if arrow_type is None or not pa.types.is_integer(arrow_type):
            if named:
                actual = "is not there" if arrow_type is None else f"is {arrow_type}"
                raise ManifestError(
                    f"{file.url}: `manifest` names `{named[0]}`, but {path!r} {actual}; expected whole numbers in both "
                    f"`{OFFSET}` and `{SIZE}`"
                )
            return False
    return True


def _check_names(layout: Layout, files: Sequence[File]) -> None:
    urls: dict[str, str] = {}
    for file in files:
        if (other := urls.setdefault(layout.name_of(file.url), file.url)) != file.url:
            raise ManifestError(
                f"{file.url} and {other} would give their rows the same ids: name a folder or glob that holds both"
            )


def _image_column(spec: RowSpec, columns: Mapping[str, str], file: File) -> str:
    """The column of structs that holds the images, or ""."""
    if spec.inline is None or "uri" in columns:
        return ""
    structs = [one.name for one in file.schema if is_image(one.type)]
    if "bytes" in columns:
        return next((name for name in structs if columns["bytes"] == f"{name}.bytes"), "")
    if {"uri", "bytes"} & set(file.schema.names) or not structs:
        return ""
    if len(structs) > 1:
        raise ManifestError(
            f"{file.url}: {len(structs)} columns hold images: {', '.join(structs)}; "
            f"name one: `manifest: {{path: …, bytes: {structs[0]}.bytes}}`"
        )
    return structs[0]


def is_image(arrow_type: pa.DataType) -> bool:
    """Whether it is a struct of `bytes` and `path`, as Hugging Face writes images."""
    if not pa.types.is_struct(arrow_type) or {one.name for one in arrow_type} != {"bytes", "path"}:
        return False
    path = arrow_type.field("path").type
    return is_binary(arrow_type.field("bytes").type) and (is_text(path) or pa.types.is_null(path))


def hive_keys(url: str) -> dict[str, str | None]:
    """Name and value of each folder `key=value` above a file."""
    keys = {unquote(key): unquote(value) for key, value in _HIVE_KEY.findall(url)}
    return {key: None if value == HIVE_NULL else value for key, value in keys.items()}


def _type_at(file: File, name: str, path: str) -> pa.DataType:
    """The type of a column of the file, nested by dots. Raises ManifestError: there is none."""
    where, keys = f"{file.url}: `manifest` reads {name!r} from {path!r}", hive_keys(file.url)
    if path in file.schema.names:
        file.refuse_without([path], f"`manifest` reads {name!r} from it: ", ManifestError)
        return file.schema.field(path).type
    first, *rest = path.split(".")
    if first not in file.schema.names:
        if path in keys:
            return pa.string()
        raise ManifestError(f"{where}: {no_such('column', first, [*file.schema.names, *keys])}")
    file.refuse_without([first], f"`manifest` reads {name!r} from it: ", ManifestError)
    arrow_type, above = file.schema.field(first).type, first
    for part in rest:
        if not pa.types.is_struct(arrow_type):
            raise ManifestError(f"{where}: {above!r} is {arrow_type}; expected a struct with a field {part!r}")
        fields = [one.name for one in arrow_type]
        if part not in fields:
            raise ManifestError(f"{where}: {no_such('field', part, fields)}")
        arrow_type, above = arrow_type.field(part).type, f"{above}.{part}"
    return arrow_type


def _column_at(part: pa.Table, path: str) -> pa.ChunkedArray | None:
    """A column of what was read, nested by dots; None where it was not read."""
    if path in part.column_names:
        return part[path]
    first, *rest = path.split(".")
    column = part[first] if first in part.column_names and rest else None
    for name in rest:
        fields = [one.name for one in column.type] if column is not None else []
        column = pc.struct_field(column, name) if name in fields else None
    return column


def _part_of(uris: pa.ChunkedArray, offset: pa.ChunkedArray, size: pa.ChunkedArray) -> pa.ChunkedArray:
    """URIs with their range of bytes; whole files where there is none."""
    first = offset.cast(pa.int64())
    last = pc.subtract(pc.add(first, size.cast(pa.int64())), 1)
    texts = [uris.cast(pa.string()), first.cast(pa.string()), last.cast(pa.string())]
    ranges = pc.binary_join_element_wise(pa.scalar("#bytes="), texts[1], pa.scalar("-"), texts[2], "")
    return pc.coalesce(pc.binary_join_element_wise(texts[0], ranges, ""), texts[0])


def _nothing(count: int, rows: int) -> Iterator[pa.Table]:
    """Tables without columns, for rows of which nothing is stored."""
    for start in range(0, count, rows):
        yield pa.table({"": pa.nulls(min(rows, count - start))})
