"""Parquet that others wrote: files in folders and globs, their footers, and types that can hold the values of all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from clipray.errors import ClipRayError, ManifestError, SchemaError
from clipray.storage.folder import absolute, as_url, explained, filesystem
from clipray.storage.folder_listing import files_under, is_glob
from clipray.storage.parquet import RowGroup, open_parquet
from clipray.tables import RECORD, REJECTS, numbers
from clipray.tables.started import STARTED

READ_ROWS = 131_072  # of a file, at a time
SUFFIXES = (".parquet", ".pq")
TABLE_FILES = (RECORD, STARTED)  # in the folder of a table of ours
IDS = "strings, whole numbers or UUIDs"
RUN_FILE, RUN_FOLDERS = "events.jsonl", ("metrics", REJECTS)  # in the output of a run


@dataclass(frozen=True)
class File:
    """A Parquet file, as its footer describes it.

    Attributes:
        row_groups: all, also those without rows; `first_row` counts in the file.
        int96: columns with timestamps in INT96 -> the type that nanoseconds give them.
    """

    url: str
    schema: pa.Schema
    row_groups: tuple[RowGroup, ...]
    int96: Mapping[str, pa.DataType]

    @property
    def rows(self) -> int:
        return sum(row_group.rows for row_group in self.row_groups)

    @property
    def whole(self) -> RowGroup:
        """All row groups as one."""
        return RowGroup(self.url, 0, 0, self.rows, count=len(self.row_groups))

    def type_of(self, column: str) -> pa.DataType | None:
        return self.schema.field(column).type if column in self.schema.names else None

    def without(self, column: str) -> str:
        """Why `column` cannot be read, for a message; "" where it can."""
        count = self.schema.names.count(column)
        if count == 1:
            return ""
        if count > 1:
            return f"{count} columns are named {column!r}; rename or drop all but one"
        listed = f"found: {', '.join(self.schema.names)}"
        if any(part.startswith(f"{column}=") for part in self.url.split("/")):
            return f"{column!r} is a folder key of the path, not a column: write it into the files; {listed}"
        return f"no column {column!r}; {listed}"

    def refuse_without(self, columns: Iterable[str], what: str = "", error: type[ClipRayError] = SchemaError) -> None:
        """Raises `error` where one of these columns cannot be read; `what` says what it is for."""
        reason = next(filter(None, map(self.without, columns)), "")
        if reason:
            raise error(f"{self.url}: {what}{reason}")

    def stream(self, columns: Iterable[str]) -> Iterator[pa.Table]:
        """These columns, `READ_ROWS` rows at a time. Raises ManifestError: the file is not whole."""
        try:
            yield from self.whole.stream(list(dict.fromkeys(columns)), READ_ROWS)
        except (pa.ArrowInvalid, OSError) as error:
            raise ManifestError(f"{self.url}: not a whole Parquet file: {error}") from error


def expand_parquet(url: str) -> list[str]:
    """The Parquet files at a file's, glob's or folder's URL.

    In a folder, hidden files and folders are left out (`.` or `_` before their names), and so are outputs of runs and
    their tables, unless the folder is such a table itself.

    Raises:
        ManifestError: there are none.
    """
    with explained(url):
        return _expand_parquet(url)


def _expand_parquet(url: str) -> list[str]:
    fs, path = filesystem(url)
    fs.invalidate_cache()  # listings of an earlier run in this process
    if is_glob(fs, path):
        paths = list(dict.fromkeys(p for match in sorted(fs.glob(path)) for p in _matched(fs, match)))
    elif fs.isdir(path):
        paths = _in_folder(fs, path.rstrip("/"))
    else:
        paths = [path] if fs.exists(path) else []
    if not paths:
        raise ManifestError(
            f"{url}: no manifest there: expected a Parquet file, a glob or a folder of Parquet; `clipray manifest DIR OUT.parquet` makes one"
        )
    return [as_url(p, url) for p in paths]


def _matched(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """A file that a glob matches, or the files of a folder with a file's name, as Spark writes them."""
    is_folder = os.path.isdir(path) if isinstance(fs, LocalFileSystem) else path.endswith(SUFFIXES) and fs.isdir(path)
    if not is_folder:
        return [path]
    return _in_folder(fs, path) if path.endswith(SUFFIXES) else []


def _in_folder(fs: fsspec.AbstractFileSystem, root: str) -> list[str]:
    paths = files_under(fs, root, _is_hidden)
    tables = {os.path.dirname(path) for path in paths if os.path.basename(path) in TABLE_FILES}
    runs = {os.path.dirname(path) for path in paths if os.path.basename(path) == RUN_FILE}
    runs &= {os.path.dirname(table) for table in tables}
    ours = (tables | runs) - {root}
    if root in runs:  # which may be where the manifest lies, too
        ours |= {f"{root}/{name}" for name in RUN_FOLDERS}
    above = tuple(f"{folder}/" for folder in ours)
    return [
        path
        for path in paths
        if path.endswith(SUFFIXES) and not _is_hidden(os.path.basename(path)) and not path.startswith(above)
    ]


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def read_footer(url: str) -> File:
    """Raises ManifestError: the file is not Parquet."""
    try:
        with explained(url), open_parquet(url) as parquet:
            row_groups = tuple(_row_groups(url, parquet.metadata))
            return File(url, parquet.schema, row_groups, _int96_columns(parquet.metadata.schema))
    except (pa.ArrowInvalid, OSError) as error:
        raise ManifestError(f"{url}: not a readable Parquet file: {error}") from error


def _row_groups(url: str, footer: pq.FileMetaData) -> Iterator[RowGroup]:
    first_row = 0
    for number in range(footer.num_row_groups):
        described = footer.row_group(number)
        yield RowGroup(url, number, first_row, described.num_rows, described.total_byte_size)
        first_row += described.num_rows


def _int96_columns(schema: pq.ParquetSchema) -> dict[str, pa.DataType]:
    leaves = (schema.column(n) for n in range(len(schema)))
    paths = [leaf.path for leaf in leaves if leaf.physical_type == "INT96"]
    if not paths:
        return {}
    by_default = schema.to_arrow_schema()
    return {field.name: field.type for field in by_default if any(f"{p}.".startswith(f"{field.name}.") for p in paths)}


def open_files(path: str) -> list[File]:
    """The Parquet files with rows at a file's, glob's or folder's path. Raises as `expand_parquet` and `read_footer`."""
    return with_rows([read_footer(url) for url in expand_parquet(absolute(path))])


def read_texts(files: Sequence[File], columns: Sequence[str], ids: Sequence[str] = ()) -> pa.Table:
    """Columns of all these files as strings without nulls. ids: those that may be whole numbers or UUIDs.

    Raises:
        ManifestError: a column is missing or holds anything else, or a file is not whole.
    """
    schema = pa.schema([(name, pa.string()) for name in columns])
    parts = [schema.empty_table()]
    for file in files:
        file.refuse_without(columns, error=ManifestError)
        for part in file.stream(columns):
            texts = [_without_nulls(file.url, name, part[name], name in ids) for name in columns]
            parts.append(pa.table(texts, schema))
    return pa.concat_tables(parts)


def _without_nulls(url: str, name: str, column: pa.ChunkedArray, is_of_ids: bool) -> pa.ChunkedArray:
    fits, wanted = (is_id, IDS) if is_of_ids else (is_text, "strings")
    if not fits(column.type):
        raise ManifestError(f"{url}: column {name!r}: expected {wanted}, found {column.type}")
    if column.null_count:
        raise ManifestError(f"{url}: column {name!r} has {column.null_count} nulls")
    return strings(url, name, with_uuids_as_text(column), ManifestError)


def strings(where: str, name: str, column: pa.ChunkedArray, error: type[ClipRayError] = SchemaError) -> pa.ChunkedArray:
    """A column as plain strings. Raises `error` where some are not UTF-8."""
    texts, broken = as_utf8(column)
    if broken.any():
        first = texts[int(np.flatnonzero(broken)[0])].as_py()
        raise error(f"{where}: column {name!r} has {broken.sum()} strings that are not UTF-8, such as {first}")
    return texts


def numbered(columns: Iterable[pa.ChunkedArray]) -> tuple[pa.Array, np.ndarray]:
    """The distinct strings of columns, perhaps of dictionaries, in order of appearance; and each row's number, (n,) int32."""
    chunks = [chunk for column in columns for chunk in column.dictionary_encode().chunks]
    encoded = pa.chunked_array(chunks, pa.dictionary(pa.int32(), pa.string())).combine_chunks()
    return encoded.dictionary, numbers(encoded.indices)


def with_rows(files: Sequence[File]) -> list[File]:
    """The files that have rows, or all where none has: writers give columns without a value any type."""
    return [file for file in files if file.rows] or list(files)


def common_type(types: Sequence[pa.DataType]) -> pa.DataType | None:
    """The type that holds the values of all of these, None where there is none.

    Equal types stay, but for views, which Arrow cannot filter. Strings of any kind and dictionaries of them are strings;
    a column of nulls goes with any type; numbers take the widest. Whether a value of an integer fits a fraction is
    checked where it is cast.
    """
    types = [without_views(arrow_type) for arrow_type in types]
    if all(arrow_type == types[0] for arrow_type in types):
        return types[0]
    schemas = [pa.schema([pa.field("column", decoded(arrow_type))]) for arrow_type in types]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field("column").type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


def without_views(arrow_type: pa.DataType) -> pa.DataType:
    """The type with plain strings and bytes in place of views of them, in lists and structs too."""
    if pa.types.is_string_view(arrow_type):
        return pa.string()
    if pa.types.is_binary_view(arrow_type):
        return pa.binary()
    if pa.types.is_struct(arrow_type):
        return pa.struct([field.with_type(without_views(field.type)) for field in arrow_type])
    if pa.types.is_list(arrow_type):
        return pa.list_(arrow_type.value_field.with_type(without_views(arrow_type.value_type)))
    return arrow_type


def decoded(arrow_type: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary, or the type itself; without views."""
    return without_views(arrow_type.value_type if pa.types.is_dictionary(arrow_type) else arrow_type)


def is_text(arrow_type: pa.DataType) -> bool:
    """Whether it is strings, of any kind that Arrow has, or a dictionary of them."""
    return decoded(arrow_type) in (pa.string(), pa.large_string())


def is_list_type(arrow_type: pa.DataType) -> bool:
    types = pa.types
    return types.is_list(arrow_type) or types.is_large_list(arrow_type) or types.is_fixed_size_list(arrow_type)


def is_binary(arrow_type: pa.DataType) -> bool:
    return pa.types.is_binary(arrow_type) or pa.types.is_large_binary(arrow_type) or pa.types.is_binary_view(arrow_type)


def is_uuid(arrow_type: pa.DataType) -> bool:
    """Whether it is UUIDs, or 16 bytes a row, as writers that do not know them have them."""
    return arrow_type == pa.uuid() or arrow_type == pa.binary(16)


def is_id(arrow_type: pa.DataType) -> bool:
    """Whether its values name rows: strings, whole numbers or UUIDs, or a dictionary of them."""
    arrow_type = decoded(arrow_type)
    return is_text(arrow_type) or pa.types.is_integer(arrow_type) or is_uuid(arrow_type)


def with_uuids_as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column; UUIDs as people write them."""
    if pa.types.is_dictionary(column.type) and is_uuid(column.type.value_type):
        column = column.cast(column.type.value_type)
    if not is_uuid(column.type):
        return column
    values = column.cast(pa.binary(16)).to_pylist() if column.type == pa.uuid() else column.to_pylist()
    return pa.chunked_array([pa.array([value and str(uuid.UUID(bytes=value)) for value in values], pa.string())])


def as_utf8(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    r"""A column as strings, with bytes that are not UTF-8 written as `\xe9`; and which rows have such, (n,) bool.

    Parquet does not check what it holds as strings, and a table with such a string cannot be read by others. UUIDs are
    written as people do.

    Raises:
        pyarrow.ArrowException: the column cannot be strings.
    """
    if column.type == pa.uuid():
        column = with_uuids_as_text(column)
    if is_binary(column.type) or pa.types.is_fixed_size_binary(column.type):
        column = pa.chunked_array([_unchecked(part) for part in column.cast(pa.binary()).chunks], pa.string())
    texts = column.cast(pa.string())
    try:
        texts.validate(full=True)
        return texts, np.zeros(len(texts), bool)
    except pa.ArrowInvalid:
        raw = texts.cast(pa.binary()).to_pylist()
    shown = [None if value is None else value.decode("utf-8", "backslashreplace") for value in raw]
    broken = [value is not None and text.encode() != value for value, text in zip(raw, shown, strict=True)]  # type: ignore[union-attr]
    return pa.chunked_array([pa.array(shown, pa.string())]), np.array(broken, bool)


def _unchecked(raw: pa.Array) -> pa.Array:
    """Bytes as strings; a cast would refuse those that are not UTF-8."""
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), offset=raw.offset)


def rows_not_utf8(column: pa.ChunkedArray) -> np.ndarray:
    """(n,) bool: rows of a column of any type that hold a string that is not UTF-8."""
    try:
        column.validate(full=True)
        return np.zeros(len(column), bool)
    except pa.ArrowInvalid:  # for this or for another reason
        return np.array([_is_not_utf8(value) for value in column], bool)


def _is_not_utf8(value: pa.Scalar) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return True
    except (ArithmeticError, LookupError, ValueError):  # such as a date that Python does not have
        return False
    return False


def int96_as_before(files: Sequence[File], column: str, arrow_type: pa.DataType) -> pa.DataType:
    """The type of a column whose timestamps are INT96: of nanoseconds where they hold all values, as tables always had it.

    Raises:
        OSError, pyarrow.ArrowInvalid: a file is not whole.
    """
    nanoseconds = next((file.int96[column] for file in files if column in file.int96), None)
    if nanoseconds is None:
        return arrow_type
    for file in files:
        for table in file.whole.stream([column], READ_ROWS):
            try:
                table[column].cast(nanoseconds)
            except pa.ArrowInvalid:
                return arrow_type
    return nanoseconds
