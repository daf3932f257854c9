"""Known labels of rows: a column of labels, joined by id; no strings are kept per row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.errors import SchemaError
from clipray.inputs.key_index import ABSENT, KeyIndex, hash_strings, seed_of
from clipray.inputs.parquet_files import decoded, expand_parquet, is_text, numbered, open_files, strings
from clipray.inputs.vector_column import IDENTITIES, table_and_column
from clipray.job import Column
from clipray.storage.folder import Folder, absolute, file_versions
from clipray.tables.digests import Digest, digest_of, files_digest, plain

SEED = seed_of("known labels")
NONE = ABSENT  # of a row without a label


@dataclass(frozen=True, eq=False)
class KnownLabels:
    """A label for each of n rows, and perhaps a group.

    Attributes:
        source: what the job calls it. ids: columns that may name a row.
        names: of the labels. index: of the rows' ids. codes: (n,) int32 into `names`, in the order of `index`.
        groups: names of the groups. group_codes: (n,) int32 into them.
    """

    source: str
    ids: tuple[str, ...]
    names: tuple[str, ...]
    index: KeyIndex
    codes: np.ndarray
    groups: tuple[str, ...]
    group_codes: np.ndarray

    def places(self, rows: pa.Table) -> np.ndarray:
        """(m,) int64: the position of each of these rows, or NONE. Raises SchemaError: they share no id column."""
        key = next((name for name in self.ids if name in rows.column_names), None)
        if key is None:
            raise SchemaError(
                f"{self.source}: its rows are named by {', '.join(self.ids)}, those of the labels by {', '.join(rows.column_names)}"
            )
        return self.index.positions(rows[key])


def read_labelled(source: str | Column, output: Folder, group: str | None = None) -> KnownLabels:
    """Read labels: `table.column` of the run at `output`, `FOLDER/table.column`, or a `Column` of any Parquet.

    Rows without a label are left out. Whole numbers are labels too, as text.

    Args:
        group: another column of the same table.

    Raises:
        JobError, SchemaError, ManifestError: there is no such column, it holds no labels, or an id stands twice.
    """
    name, ids, column, parts = _opened(source, output, group)
    keys, labels, groups = [np.zeros(0, np.uint64)], [], []
    for part in parts:
        texts = _as_strings(name, column, part[column])
        labelled = texts.is_valid()
        keys.append(hash_strings(_as_strings(name, ids[0], part[ids[0]]).filter(labelled), SEED))
        labels.append(texts.drop_null().dictionary_encode())
        if group:
            groups.append(_as_strings(name, group, part[group]).filter(labelled).fill_null("").dictionary_encode())
    index, order = KeyIndex.of(np.concatenate(keys), SEED)
    if not len(index):
        raise SchemaError(f"{name}: no row has a label")
    if index.repeats:
        raise SchemaError(f"{name}: {index.repeats} rows have an id that stands in an earlier row; ids must be unique")
    names, codes = numbered(labels)
    group_names, group_codes = numbered(groups) if group else (pa.array([""]), np.zeros(len(order), np.int32))
    names_of, groups_of = tuple(names.to_pylist()), tuple(group_names.to_pylist())
    return KnownLabels(name, ids, names_of, index, codes[order], groups_of, group_codes[order])


def fingerprint_of(source: str | Column, output: Folder) -> tuple[dict[str, Any], Digest]:
    """What decides the labels, and a digest of their files, without reading them. Raises as `read_labelled`."""
    if isinstance(source, Column):
        return source.identity(), plain(digest_of(file_versions(expand_parquet(absolute(source.path)))))
    folder, column = table_and_column(source, output)
    record = tables.finished(folder, source)
    return {"table": record.fingerprint, "column": column}, files_digest(record.files)


def _opened(
    source: str | Column, output: Folder, group: str | None
) -> tuple[str, tuple[str, ...], str, Iterator[pa.Table]]:
    grouped = [group] if group else []
    if isinstance(source, Column):
        parts = _parts(source.path, [source.id, source.column, *grouped])
        return f"{source.path}: {source.column}", (source.id, *IDENTITIES[::-1]), source.column, parts
    folder, column = table_and_column(source, output)
    record = tables.finished(folder, source)
    ids = tuple(name for name in reversed(IDENTITIES) if name in record.columns)
    return source, ids, column, tables.iter_table(folder.url, list(dict.fromkeys([ids[0], column, *grouped])))


def _parts(path: str, columns: list[str]) -> Iterator[pa.Table]:
    for file in open_files(path):
        file.refuse_without(columns)
        yield from file.stream(columns)


def _as_strings(source: str, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    arrow_type = decoded(column.type)
    if not (is_text(arrow_type) or pa.types.is_integer(arrow_type) or pa.types.is_null(arrow_type)):
        raise SchemaError(f"{source}: column {name!r}: expected strings or whole numbers, found {column.type}")
    return strings(source, name, column)
