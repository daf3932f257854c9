"""The only door to Parquet: schemas as data, validation of what is read and written, provenance, commit records.

A table is a folder of Parquet shards. Its commit record `_table.json` is written last; a folder without one is not
finished. The schemas are `schemas/*.json`; code reads them, and so can people and other tools.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipray.errors import ClipRayError, SchemaError
from clipray.notes import wrong_fields
from clipray.parquet import open_parquet_on
from clipray.storage import Folder

RECORD = "_table.json"
FILE = {"name": str, "rows": int, "bytes": int}  # of a record's `files`
ROW_GROUP_ROWS = 16_384
ARROW_TYPES = {
    "string": pa.string(), "binary": pa.binary(), "int32": pa.int32(), "int64": pa.int64(), "bool": pa.bool_(),
    "float32": pa.float32(), "float64": pa.float64(),
    "box": pa.list_(pa.field("element", pa.float32(), nullable=False), 4),
    "ranking": pa.list_(
        pa.field("element", pa.struct([pa.field("label", pa.string(), False), pa.field("probability", pa.float32(), False)]), False)
    ),
}  # fmt: skip


ELEMENTS = {"float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64()}


@functools.cache
def _schema_folder() -> Path:
    packaged = Path(__file__).parent / "schemas"  # in a wheel; in a checkout they lie beside the package
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "schemas"


def table_names() -> list[str]:
    """Names of all table types, sorted."""
    return sorted(path.stem for path in _schema_folder().glob("*.json"))


@functools.cache
def table_schema(table: str) -> dict[str, Any]:
    """The schema of a table type, as `schemas/<table>.json` holds it. Treat it as read-only.

    Raises:
        SchemaError: there is no such table.
    """
    if table not in table_names():
        raise SchemaError(f"no table {table!r}; there are: {', '.join(table_names())}")
    return json.loads((_schema_folder() / f"{table}.json").read_text(encoding="utf-8"))


def vector_type(width: int, element: str = "float32") -> pa.DataType:
    """Arrow type of a vector column: `fixed_size_list<element not null>[width]`."""
    return pa.list_(pa.field("element", ELEMENTS[element], nullable=False), width)


def vector_array(matrix: np.ndarray, kind: pa.DataType) -> pa.Array:
    """(n, d) -> vector column of n rows."""
    values = np.ascontiguousarray(matrix, kind.value_type.to_pandas_dtype()).ravel()
    return pa.FixedSizeListArray.from_arrays(pa.array(values, kind.value_type), type=kind)


def arrow_schema(
    table: str,
    vectors: Mapping[str, int] | None = None,
    *,
    element: str = "float32",
    extra: Sequence[pa.Field] = (),
) -> pa.Schema:
    """The Arrow schema of a table: the fixed columns, a vector column per name in `vectors` (name -> width), `extra`."""
    spec = table_schema(table)
    fields = [
        pa.field(
            c["name"],
            ARROW_TYPES[c["type"]],
            c["nullable"],
            {"doc": c["doc"], **({"unit": c["unit"]} if "unit" in c else {})},
        )
        for c in spec["columns"]
        if c["type"] in ARROW_TYPES and not c["name"].startswith("<") and not c.get("optional")
    ]
    fields += [pa.field(name, vector_type(width, element), False) for name, width in (vectors or {}).items()]
    return pa.schema([*fields, *extra])


def rejects_schema(*names: str) -> pa.Schema:
    """The Arrow schema of a table's rejects: `names` say which row it was (its identity first), the rest why."""
    return pa.schema([*(pa.field(name, pa.string()) for name in names), *arrow_schema("rejects")])


def check(table: str, data: pa.Table, schema: pa.Schema) -> None:
    """Refuse data that is not what `schema` says: names, types, nulls, closed sets of values.

    Raises:
        SchemaError: naming the column, what was expected and what was found.
    """
    if data.schema.names != schema.names:
        raise SchemaError(f"{table}: expected columns {schema.names}, found {data.schema.names}")
    for expected, column in zip(schema, data.columns, strict=True):
        if column.type != expected.type:
            raise SchemaError(f"{table}.{expected.name}: expected {expected.type}, found {column.type}")
        if not expected.nullable and column.null_count:
            raise SchemaError(
                f"{table}.{expected.name}: expected no nulls, found {column.null_count} in {len(column)} rows"
            )
    for spec in table_schema(table)["columns"]:
        if "values" in spec and data.num_rows:
            found = set(pc.unique(data[spec["name"]]).to_pylist()) - set(spec["values"])
            if found:
                raise SchemaError(f"{table}.{spec['name']}: {sorted(found)} not in {spec['values']}")


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a table."""

    name: str
    rows: int
    bytes: int


def write_shard(folder: Folder, name: str, table: str, data: pa.Table, provenance: Mapping[str, Any]) -> Shard:
    """Validate `data` against its own schema's table type and write it as one shard, seen whole or not at all.

    Vector columns are stored without a dictionary and with BYTE_STREAM_SPLIT, which reads three times as fast as the
    defaults and is smaller. Statistics are of plain columns only, as nobody looks for the least component. `provenance` goes into the file's metadata under the key `clipray`.
    """
    check(table, data, data.schema)
    vectors = [f.name for f in data.schema if pa.types.is_fixed_size_list(f.type)]
    stamp = {"table": table, "schema_version": table_schema(table)["version"], **provenance}
    data = data.replace_schema_metadata({"clipray": json.dumps(stamp, ensure_ascii=False)})
    sink = io.BytesIO()
    pq.write_table(
        data,
        sink,
        compression="zstd",
        row_group_size=ROW_GROUP_ROWS,
        use_dictionary=list(_repetitive(data.schema)),
        use_byte_stream_split=[f"{name}.list.element" for name in vectors],
        write_page_checksum=True,
        write_statistics=[f.name for f in data.schema if not pa.types.is_nested(f.type)],
        store_schema=True,
    )
    payload = sink.getvalue()
    folder.write(name, payload)
    return Shard(name, data.num_rows, len(payload))


def _repetitive(schema: pa.Schema) -> Iterator[str]:
    """Columns of which a dictionary may be worthwhile, as Parquet calls them: no names of rows, no numbers with a fraction."""
    for column in schema:
        kind = column.type
        if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type):
            inner = (f for f in kind.value_type if not _fractions(f.type))
            yield from (f"{column.name}.list.element.{f.name}" for f in inner)
        elif not (pa.types.is_fixed_size_list(kind) or _fractions(kind) or _names_rows(column)):
            yield column.name


def _names_rows(column: pa.Field) -> bool:
    """Such as `image_id`: nearly every value is another. `cluster_id` is a number, and repeats."""
    return column.name.endswith("_id") and bool(pa.types.is_string(column.type))


def _fractions(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind))


@contextlib.contextmanager
def _reading(folder: Folder, name: str) -> Iterator[None]:
    """Only Arrow's own complaints (ArrowInvalid, a plain OSError) say that a file is torn."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, pa.ArrowInvalid) or (type(error) is OSError and error.errno is None):
            raise SchemaError(f"{folder.path(name)}: not a whole Parquet file: {error}") from error
        raise ClipRayError(f"{folder.path(name)}: cannot be read: {error}") from error  # disk, network, permission


def read_shard(folder: Folder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one shard.

    Raises:
        SchemaError: the file is torn or no Parquet.
        FileNotFoundError: it is not there.
    """
    with _reading(folder, name), open_parquet_on(folder.fs, folder.path(name)) as parquet:
        return parquet.read(columns)


def shard_stamp(folder: Folder, name: str) -> tuple[int, pa.Schema, dict[str, Any]]:
    """Rows, Arrow schema and provenance of a shard, from its footer alone. Raises as `read_shard`."""
    with _reading(folder, name), open_parquet_on(folder.fs, folder.path(name)) as parquet:
        stamp = json.loads((parquet.schema.metadata or {}).get(b"clipray", b"{}"))
        return parquet.metadata.num_rows, parquet.schema, stamp


def shard_is(folder: Folder, name: str, stamp: Mapping[str, Any], rows: int | None = None) -> bool:
    """Whether the shard is whole and was written with this provenance (and has that many rows)."""
    try:
        found, _, written = shard_stamp(folder, name)
    except (SchemaError, FileNotFoundError):
        return False
    own = {key: value for key, value in written.items() if key not in ("table", "schema_version")}
    return own == json.loads(json.dumps(stamp)) and rows in (None, found)


@dataclass(frozen=True)
class Record:
    """The commit record of a finished table, `_table.json`."""

    table: str
    schema_version: int
    columns: dict[str, str]
    rows: int
    rejects: int
    files: list[dict[str, Any]]
    fingerprint: str
    inputs: dict[str, Any]
    settings: dict[str, Any]
    provenance: dict[str, Any]
    rejects_by_reason: dict[str, int] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    workers: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    rows_per_s: float = 0.0
    finished_at: str = ""


def commit(folder: Folder, record: Record) -> None:
    """Write the commit record: from here on the table is finished."""
    folder.write_json(RECORD, asdict(record))


def finish(
    folder: Folder, table: str, schema: pa.Schema, files: Sequence[Shard], *, rejects: int = 0, **facts: Any
) -> Record:
    """Commit a table of these shards; `facts` are the other fields of its `Record`."""
    record = Record(
        table,
        table_schema(table)["version"],
        {field.name: str(field.type) for field in schema},
        rows=sum(shard.rows for shard in files),
        rejects=rejects,
        files=[asdict(shard) for shard in files],
        **facts,
    )
    commit(folder, record)
    return record


def now() -> str:
    """The time in ISO 8601, UTC, to the second, as records hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_record(folder: Folder) -> Record | None:
    """The commit record, or None when the table is not finished."""
    data = folder.read_json(RECORD)
    if data is None:
        return None
    known = {name: data[name] for name in Record.__dataclass_fields__ if name in data}
    try:
        record = Record(**known)
    except TypeError as error:
        raise SchemaError(f"{folder.path(RECORD)}: written by another version of clipray: {error}") from error
    wrong = wrong_fields(asdict(record), typing.get_type_hints(Record))
    wrong += ["files"] * any(wrong_fields(file, FILE) or FILE.keys() - file.keys() for file in record.files)
    if wrong:
        raise SchemaError(
            f"{folder.path(RECORD)}: not as clipray writes it: {', '.join(wrong)}; make the table anew with --fresh"
        )
    return record


def finished(folder: Folder, what: str) -> Record:
    """The commit record of an input, which errors call `what`. Raises SchemaError where the table is not finished."""
    record = read_record(folder)
    if record is None:
        raise SchemaError(f"{what}: {folder.url} is no finished table; finish it with `clipray run`")
    return record


def reopen(folder: Folder) -> None:
    """Make a table unfinished, to write more of its shards."""
    for name in (RECORD, *folder.leftovers()):
        folder.remove(name)


def clear(folder: Folder) -> None:
    """Make a table unfinished and empty."""
    reopen(folder)
    for name in shard_names(folder):
        folder.remove(name)


def shard_names(folder: Folder) -> list[str]:
    """Names of the Parquet files in the folder, sorted."""
    return sorted(name for name in folder.sizes() if name.endswith(".parquet") and not name.startswith((".", "_")))


def intact(folder: Folder, record: Record) -> bool:
    """Whether the folder holds the very files of its record: names and sizes."""
    sizes = folder.sizes()
    found = {
        name: size for name, size in sizes.items() if name.endswith(".parquet") and not name.startswith((".", "_"))
    }
    return found == {file["name"]: file["bytes"] for file in record.files}


def iter_table(url: str | os.PathLike[str], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The shards of a finished table, one after the other.

    Raises:
        SchemaError: the table is not finished, a shard is missing or torn, or a shard belongs to another space.
    """
    folder = Folder(url := os.fspath(url))
    record = read_record(folder)
    if record is None:
        raise SchemaError(f"{url}: no {RECORD}, so the table is not finished; finish it with `clipray run`")
    unknown = sorted(set(columns or ()) - set(record.columns))
    if unknown:
        raise SchemaError(f"{url}: no column {unknown[0]!r}; there are: {', '.join(record.columns)}")
    for file in record.files:
        try:
            _, schema, stamp = shard_stamp(folder, file["name"])
        except FileNotFoundError as error:
            raise SchemaError(f"{url}: {file['name']} is missing; `clipray run` makes its rows again") from error
        if stamp.get("fingerprint") != record.fingerprint:
            raise SchemaError(f"{url}: {file['name']} was made with other settings than the rest of the table")
        if {f.name: str(f.type) for f in schema} != record.columns:
            raise SchemaError(f"{url}: {file['name']}: expected columns {record.columns}, found {schema.names}")
        yield read_shard(folder, file["name"], columns)


def read_table(url: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """A finished table as one Arrow table, validated shard by shard. See `iter_table` for larger ones."""
    parts = list(iter_table(url, columns))
    if not parts:
        raise SchemaError(f"{url}: the table has no rows")
    return pa.concat_tables(parts)
