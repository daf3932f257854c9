"""The only door to the tables that clipray writes: their schemas, shards and commit records.

A table is a folder of Parquet shards. Its commit record `_table.json` is written last; a folder without one is not
finished.
"""

from clipray.tables.arrays import matrix, number_array, numbers, vector_array
from clipray.tables.record import (
    DAMAGED,
    RECORD,
    Record,
    clear,
    commit,
    finished,
    intact,
    is_broken,
    iter_table,
    note_damaged,
    noted_as_damaged,
    now,
    read_record,
    read_table,
    record_to_go_on,
    reopen,
    whole_record,
    write_record,
)
from clipray.tables.schema import (
    ARROW_TYPES,
    arrow_schema,
    check,
    fits,
    rejects_schema,
    table_names,
    table_schema,
    vector_type,
)
from clipray.tables.shards import (
    REJECTS,
    Shard,
    named_as_ours,
    provenance_of,
    read_shard,
    rejects_of,
    remove_own,
    shard_footer,
    shard_is,
    shard_names,
    unwritable,
    verified,
    verify_shards,
    write_shard,
)
