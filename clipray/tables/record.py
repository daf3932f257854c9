"""Commit records: `_table.json`, which is written last and makes a folder of shards a finished table."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from clipray.errors import DamagedError, SchemaError
from clipray.storage.folder import Folder
from clipray.storage.seals import open_json, sealed_json
from clipray.tables.schema import table_schema
from clipray.tables.shards import Shard, read_shard, remove_own, shard_footer, shard_names
from clipray.tables.started import wrong_fields

RECORD = "_table.json"
DAMAGED = "_damaged.json"  # written by `clipray verify`
ON_DISK = {"summary": "figures"}  # fields that `_table.json` calls otherwise
FILE = {"name": str, "rows": int, "bytes": int}  # of `files`


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
    summary: dict[str, Any] = field(default_factory=dict)
    workers: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    rows_per_s: float = 0.0
    finished_at: str = ""

    def stored(self) -> dict[str, Any]:
        """As `_table.json` holds it."""
        return {ON_DISK.get(name, name): value for name, value in asdict(self).items()}


def write_record(folder: Folder, record: Record) -> None:
    folder.write(RECORD, sealed_json(record.stored()))


def commit(
    folder: Folder, table: str, schema: pa.Schema, shards: Sequence[Shard], *, rejects: int = 0, **facts: Any
) -> Record:
    """Write the commit record of a table of these shards: from here on it is finished. facts: more of its `Record`."""
    record = Record(
        table,
        table_schema(table)["version"],
        {field.name: str(field.type) for field in schema},
        rows=sum(shard.rows for shard in shards),
        rejects=rejects,
        files=[shard.entry() for shard in shards],
        **facts,
    )
    write_record(folder, record)
    return record


def now() -> str:
    """The time in ISO 8601, UTC, to the second, as records hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_record(folder: Folder) -> Record | None:
    """The commit record, or None when the table is not finished.

    Raises:
        DamagedError: it has changed since it was written.
    """
    data = folder.read(RECORD)
    if data is None:
        return None
    try:
        values, sealed = open_json(data)
        types = typing.get_type_hints(Record)
        keys = {name: ON_DISK.get(name, name) for name in types}
        record = Record(**{name: values[key] for name, key in keys.items() if key in values})
        wrong = wrong_fields(record.stored(), {keys[name]: types[name] for name in types})
        wrong += ["files"] * any(wrong_fields(file, FILE) or FILE.keys() - file.keys() for file in record.files)
        if wrong:
            raise ValueError(f"not as clipray writes it: {', '.join(wrong)}")
        if not sealed and (values.keys() - record.stored().keys() or any("sha256" in file for file in record.files)):
            raise ValueError("its checksum is missing")
    except (TypeError, ValueError) as error:
        raise DamagedError(
            f"{folder.path(RECORD)} is damaged, or of another version of clipray: {error}; "
            "`clipray verify` says what is whole, `clipray run` repairs it"
        ) from error
    return record


def record_to_go_on(folder: Folder) -> Record | None:
    """The commit record, for a run, to which a table with a damaged one is not finished."""
    try:
        return read_record(folder)
    except DamagedError:
        return None


def finished(folder: Folder, what: str) -> Record:
    """The commit record of an input, which errors call `what`. Raises SchemaError where the table is not finished."""
    record = read_record(folder)
    if record is None:
        raise SchemaError(f"{what}: {folder.url} is no finished table; finish it with `clipray run`")
    return record


def reopen(folder: Folder) -> None:
    """Make a table unfinished, to write more of its shards; those that are noted as damaged are removed."""
    for name in (RECORD, *folder.leftovers()):
        folder.remove(name)
    drop_damaged(folder)


def clear(folder: Folder, table: str) -> None:
    """Make a table of type `table` unfinished and empty.

    Raises:
        StaleTableError: Parquet of somebody else lies there; then nothing is removed.
    """
    remove_own(folder, shard_names(folder), table)
    reopen(folder)


def note_damaged(folder: Folder, names: Iterable[str]) -> None:
    """Note which files of a table are damaged, so that the next run makes their rows again."""
    folder.write(DAMAGED, sealed_json({"files": sorted(names)}))


def noted_as_damaged(folder: Folder) -> list[str] | None:
    """Files of a table that `note_damaged` named; None where there is no note, empty where it is damaged itself."""
    data = folder.read(DAMAGED)
    if data is None:
        return None
    try:
        names = open_json(data)[0].get("files", [])
    except ValueError:
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def is_broken(folder: Folder) -> bool:
    """Whether a table is noted as damaged, or finished but not as its record says."""
    try:
        record = read_record(folder)
    except DamagedError:
        return True
    return noted_as_damaged(folder) is not None if record is None else not intact(folder, record)


def drop_damaged(folder: Folder) -> None:
    """Remove the shards that are noted as damaged, and the note. Raises StaleTableError: one is somebody else's."""
    names = noted_as_damaged(folder)
    if names is not None:
        remove_own(folder, set(names) & set(shard_names(folder)))
        folder.remove(DAMAGED)


def intact(folder: Folder, record: Record) -> bool:
    """Whether the folder holds the very files of its record, by names and sizes, and none is noted as damaged."""
    sizes = folder.sizes()
    if DAMAGED in sizes:
        return False
    shards = {
        name: size for name, size in sizes.items() if name.endswith(".parquet") and not name.startswith((".", "_"))
    }
    return shards == {file["name"]: file["bytes"] for file in record.files}


def whole_record(folder: Folder) -> Record | None:
    """The record of a finished table whose files are all there, none of them noted as damaged."""
    record = record_to_go_on(folder)
    return record if record is not None and intact(folder, record) else None


def iter_table(url: str | os.PathLike[str], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The shards of a finished table, one after the other.

    Raises:
        SchemaError: the table is not finished, a shard is missing or torn, or a shard belongs to another space.
    """
    folder, record = Folder(os.fspath(url)), record_at(url, columns or ())
    for file in record.files:
        schema_of_shard(folder, record, file["name"])
        yield read_shard(folder, file["name"], columns)


def record_at(url: str | os.PathLike[str], columns: Iterable[str] = ()) -> Record:
    """The commit record of a finished table with these columns. Raises SchemaError."""
    record = read_record(Folder(os.fspath(url)))
    if record is None:
        raise SchemaError(f"{url}: no {RECORD}, so the table is not finished; finish it with `clipray run`")
    unknown = sorted(set(columns) - set(record.columns))
    if unknown:
        raise SchemaError(f"{url}: no column {unknown[0]!r}; there are: {', '.join(record.columns)}")
    return record


def schema_of_shard(folder: Folder, record: Record, name: str) -> pa.Schema:
    """The schema of a shard, which is there and belongs to the table. Raises SchemaError."""
    try:
        _, schema, metadata = shard_footer(folder, name)
    except FileNotFoundError as error:
        raise SchemaError(f"{folder.url}: {name} is missing; `clipray run` makes its rows again") from error
    if metadata.get("fingerprint") != record.fingerprint:
        raise SchemaError(f"{folder.url}: {name} was made with other settings than the rest of the table")
    if {field.name: str(field.type) for field in schema} != record.columns:
        raise SchemaError(f"{folder.url}: {name}: expected columns {record.columns}, found {schema.names}")
    return schema


def read_table(url: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """A finished table as one Arrow table, validated shard by shard. See `iter_table` for larger ones."""
    parts = list(iter_table(url, columns))
    if not parts:
        raise SchemaError(f"{url}: the table has no rows")
    return pa.concat_tables(parts)
