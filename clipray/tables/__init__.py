"""The only door to the tables that clipray writes: their schemas, shards and commit records.

A table is a folder of Parquet shards. Its commit record `_table.json` is written last; a folder without one is not
finished.
"""

from clipray.tables.records import (
    RECORD,
    Record,
    clear,
    commit,
    finish,
    finished,
    intact,
    iter_table,
    now,
    read_record,
    read_table,
    record_to_go_on,
    reopen,
)
from clipray.tables.schemas import (
    ARROW_TYPES,
    arrow_schema,
    check,
    rejects_schema,
    table_names,
    table_schema,
    vector_array,
    vector_type,
)
from clipray.tables.shards import (
    Shard,
    provenance_of,
    read_shard,
    shard_is,
    shard_names,
    shard_stamp,
    verified,
    whole_shards,
    write_shard,
)

__all__ = [
    "ARROW_TYPES",
    "RECORD",
    "Record",
    "Shard",
    "arrow_schema",
    "check",
    "clear",
    "commit",
    "finish",
    "finished",
    "intact",
    "iter_table",
    "now",
    "provenance_of",
    "read_record",
    "read_shard",
    "read_table",
    "record_to_go_on",
    "rejects_schema",
    "reopen",
    "shard_is",
    "shard_names",
    "shard_stamp",
    "table_names",
    "table_schema",
    "vector_array",
    "vector_type",
    "verified",
    "whole_shards",
    "write_shard",
]
