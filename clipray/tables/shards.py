"""Shards: the Parquet files of a table, which say what made them and carry a checksum of themselves."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipray.errors import ClipRayError, DamagedError, SchemaError, StaleTableError, one_line
from clipray.storage import seals
from clipray.storage.folder import Folder, explained
from clipray.storage.parquet import open_parquet_on
from clipray.tables.schema import check, table_names, table_schema

ROW_GROUP_ROWS = 16_384
REJECTS = "rejects"  # the folder of a run in which the rejects of each table have their own
READERS = 8  # files that are verified at once: so many requests does an object store answer together
_OF_THE_FILE = ("table", "schema_version", "sealed")  # keys of the metadata that say nothing of what made the rows


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a table. sha256: of the whole file, 64 hex digits; "" where it is not known."""

    name: str
    rows: int
    bytes: int
    sha256: str = ""

    def entry(self) -> dict[str, Any]:
        """As a commit record lists it."""
        entry = asdict(self)
        return entry if self.sha256 else {name: entry[name] for name in entry if name != "sha256"}


def rejects_of(output: Folder, table: str) -> Folder:
    """The rejects of a table of the run at `output`."""
    return output.sub(f"{REJECTS}/{table}")


def write_shard(folder: Folder, name: str, table: str, data: pa.Table, provenance: Mapping[str, Any]) -> Shard:
    """Validate `data` against its own schema's table type and write it as one shard, seen whole or not at all.

    Vector columns are stored without a dictionary and with BYTE_STREAM_SPLIT, which reads three times as fast as the
    defaults and is smaller. Statistics are of plain columns only, as nobody looks for the least component. `provenance` goes into the file's metadata under the key `clipray`.
    """
    check(table, data, data.schema)
    metadata = {"table": table, "schema_version": table_schema(table)["version"], "sealed": "sha256", **provenance}
    data = data.replace_schema_metadata({"clipray": json.dumps(metadata, ensure_ascii=False)})
    sink = io.BytesIO()
    with _writer(sink, data.schema) as writer:
        writer.write_table(data, ROW_GROUP_ROWS)
        writer.add_key_value_metadata({seals.KEY: seals.BLANK})
    sha256 = seals.seal(sink)
    payload = sink.getvalue()
    folder.write(name, payload)
    return Shard(name, data.num_rows, len(payload), sha256)


def _writer(sink: io.BytesIO, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        use_dictionary=list(_repetitive(schema)),
        use_byte_stream_split=[
            f"{field.name}.list.element"
            for field in schema
            if pa.types.is_fixed_size_list(field.type) and pa.types.is_floating(field.type.value_type)
        ],
        write_page_checksum=True,
        write_statistics=[f.name for f in schema if not pa.types.is_nested(f.type)],
        store_schema=True,
    )


def unwritable(column: pa.Field) -> str:
    """Why a shard cannot hold a column of this type, for a message; "" where it can."""
    sink, schema = io.BytesIO(), pa.schema([column.with_nullable(True)])
    try:
        with _writer(sink, schema) as writer:
            writer.write_table(pa.table([pa.nulls(1, column.type)], schema=schema))
        read_as = pq.read_schema(sink).field(0).type
    except pa.ArrowException as error:
        return f"Parquet cannot hold it: {error}"
    return "" if read_as == column.type else f"Parquet would hold it as {read_as}"


def _repetitive(schema: pa.Schema) -> Iterator[str]:
    """Columns of which a dictionary may be worthwhile, as Parquet calls them: no names of rows, no numbers with a fraction."""
    for column in schema:
        column_type = column.type
        if pa.types.is_list(column_type) and pa.types.is_struct(column_type.value_type):
            inner = (f for f in column_type.value_type if not pa.types.is_floating(f.type))
            yield from (f"{column.name}.list.element.{f.name}" for f in inner)
        elif not (pa.types.is_fixed_size_list(column_type) or pa.types.is_floating(column_type) or _names_rows(column)):
            yield column.name


def _names_rows(column: pa.Field) -> bool:
    """Such as `image_id`: nearly every value is another. `cluster_id` is a number, and repeats."""
    return column.name.endswith("_id") and bool(pa.types.is_string(column.type))


@contextlib.contextmanager
def _reading(folder: Folder, name: str) -> Iterator[None]:
    """Complaints of Arrow itself, a plain OSError among them, and text that is no text say that a file is torn."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        if not isinstance(error, OSError) or (type(error) is OSError and error.errno is None):
            raise SchemaError(f"{folder.path(name)}: not a whole Parquet file: {one_line(error)}") from error
        raise ClipRayError(f"{folder.path(name)}: cannot be read: {error}") from error  # disk, network, permission


def read_shard(folder: Folder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one shard.

    Raises:
        SchemaError: the file is torn or no Parquet.
        FileNotFoundError: it is not there.
    """
    with _reading(folder, name), open_parquet_on(folder.fs, folder.path(name)) as parquet:
        return parquet.read(columns)


def shard_footer(folder: Folder, name: str) -> tuple[int, pa.Schema, dict[str, Any]]:
    """Rows, Arrow schema and provenance of a shard, from its footer alone. Raises as `read_shard`."""
    with _reading(folder, name), open_parquet_on(folder.fs, folder.path(name)) as parquet:
        metadata = json.loads((parquet.schema.metadata or {}).get(b"clipray", b"{}"))
        return parquet.metadata.num_rows, parquet.schema, metadata


def provenance_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What made the rows, of what `shard_footer` returned: as it was given to `write_shard`."""
    return {key: value for key, value in metadata.items() if key not in _OF_THE_FILE}


def shard_is(folder: Folder, name: str, metadata: Mapping[str, Any], rows: int | None = None) -> bool:
    """Whether the shard was written with this provenance (and has that many rows), as its footer says."""
    try:
        row_count, _, written = shard_footer(folder, name)
    except (SchemaError, FileNotFoundError):
        return False
    return provenance_of(written) == json.loads(json.dumps(metadata)) and rows in (None, row_count)


def verified(folder: Folder, name: str) -> Shard:
    """A shard whose every byte was compared with the file's own checksum. One of a version before has none, and is taken.

    Raises:
        DamagedError: it has changed since it was written. SchemaError: it is torn or no Parquet.
        FileNotFoundError: it is not there.
    """
    with _reading(folder, name), explained(folder.url), folder.fs.open(folder.path(name), "rb") as file:
        sha256, whole = seals.file_hashes(file)
        size = file.seek(0, io.SEEK_END)
    if whole is not False:  # the footer of a damaged file may say anything
        rows, _, metadata = shard_footer(folder, name)
        if whole or "sealed" not in metadata:
            return Shard(name, rows, size, sha256)
    raise DamagedError(f"{folder.path(name)} has changed since it was written; `clipray run` makes its rows again")


def verify_shards(folder: Folder, names: Sequence[str]) -> tuple[dict[str, Shard], dict[str, SchemaError]]:
    """Of these shards those that are whole, and why the others are not; several are read at once. See `verified`."""

    def verdict(name: str) -> Shard | SchemaError | None:
        try:
            return verified(folder, name)
        except FileNotFoundError:
            return None
        except SchemaError as error:
            return error

    with ThreadPoolExecutor(READERS, "clipray-verify") as threads:
        verdicts = dict(zip(names, threads.map(verdict, names), strict=True))
    whole = {name: shard for name, shard in verdicts.items() if isinstance(shard, Shard)}
    return whole, {name: error for name, error in verdicts.items() if isinstance(error, SchemaError)}


def remove_own(folder: Folder, names: Iterable[str], table: str | None = None) -> None:
    """Remove shards of a table type (None: of any). Of torn files only the name says whose they are.

    Raises:
        StaleTableError: one of them is Parquet of somebody else; then none is removed.
    """
    names = list(names)
    with ThreadPoolExecutor(READERS, "clipray-verify") as threads:
        are_own = list(threads.map(lambda name: _is_own(folder, name, table), names))
    for name, ours in zip(names, are_own, strict=True):
        if not ours:
            raise StaleTableError(
                f"{folder.path(name)} is no file of this table that clipray wrote; move it away, or give the table another `name`"
            )
    for name in names:
        folder.remove(name)


def _is_own(folder: Folder, name: str, table: str | None) -> bool:
    try:
        metadata = shard_footer(folder, name)[2]
    except FileNotFoundError:
        return True
    except SchemaError:
        return named_as_ours(name)
    return "fingerprint" in metadata and metadata.get("table") in ({table} if table else table_names())


def named_as_ours(name: str) -> bool:
    """Whether a shard is named as all are but those of `metrics`."""
    return name.startswith(("part-", "refused."))


def shard_names(folder: Folder) -> list[str]:
    """Names of the Parquet files in the folder, sorted."""
    return sorted(name for name in folder.sizes() if name.endswith(".parquet") and not name.startswith((".", "_")))
