"""Known labels of rows: a column of labels, joined by id; no strings are kept per row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.errors import JobError, ManifestError, SchemaError
from clipray.inputs.key_index import ABSENT, KeyIndex, hash_strings, seed_of
from clipray.inputs.parquet_files import READ_ROWS, as_utf8, expand_parquet, is_text, read_footer, with_rows
from clipray.inputs.vector_column import IDENTITIES
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
    coders = {wanted: _Coder() for wanted in (column, *([group] if group else []))}
    keys: list[np.ndarray] = []
    codes: dict[str, list[np.ndarray]] = {wanted: [] for wanted in coders}
    for part in parts:
        labels = _as_strings(name, column, part[column])
        labelled = labels.is_valid()
        keys.append(hash_strings(_as_strings(name, ids[0], part[ids[0]]).filter(labelled), SEED))
        codes[column].append(coders[column].codes(labels.drop_null()))
        if group:
            groups_of = _as_strings(name, group, part[group]).filter(labelled)
            codes[group].append(coders[group].codes(groups_of.fill_null("")))
    index, order = KeyIndex.of(np.concatenate([np.zeros(0, np.uint64), *keys]), SEED)
    if not len(index):
        raise SchemaError(f"{name}: no row has a label")
    if index.repeats:
        raise SchemaError(f"{name}: {index.repeats} rows have an id that stands in an earlier row; ids must be unique")
    of_rows, by = (np.concatenate(codes[c])[order] if c else np.zeros(len(order), np.int32) for c in (column, group))
    names, groups = coders[column].names, coders[group].names if group else [""]
    return KnownLabels(name, ids, tuple(names), index, of_rows, tuple(groups), by)


def fingerprint_of(source: str | Column, output: Folder) -> tuple[dict[str, Any], Digest]:
    """What decides the labels, and a digest of their files, without reading them. Raises as `read_labelled`."""
    if isinstance(source, Column):
        return source.identity(), plain(digest_of(file_versions(expand_parquet(absolute(source.path)))))
    folder, column = _table_of(source, output)
    record = tables.finished(folder, source)
    return {"table": record.fingerprint, "column": column}, files_digest(record.files)


def _table_of(source: str, output: Folder) -> tuple[Folder, str]:
    table, _, column = source.rpartition(".")
    if not table or "/" in column:
        raise JobError(
            f"{source!r}: expected `table.column`, `FOLDER/table.column`, or a mapping with `path`, `column` and `id`"
        )
    return output.named(table), column


class _Coder:
    """Numbers strings in order of appearance."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        return list(self._known)

    def codes(self, strings: pa.ChunkedArray) -> np.ndarray:
        """(n,) int32."""
        encoded = strings.combine_chunks().dictionary_encode()
        numbers = [self._known.setdefault(name, len(self._known)) for name in encoded.dictionary.to_pylist()]
        return np.array(numbers, np.int32)[encoded.indices.to_numpy()] if numbers else np.zeros(0, np.int32)


def _opened(
    source: str | Column, output: Folder, group: str | None
) -> tuple[str, tuple[str, ...], str, Iterator[pa.Table]]:
    if isinstance(source, Column):
        wanted = [source.id, source.column, *([group] if group else [])]
        return (
            f"{source.path}: {source.column}",
            (source.id, *IDENTITIES[::-1]),
            source.column,
            _any(source.path, wanted),
        )
    folder, column = _table_of(source, output)
    record = tables.finished(folder, source)
    ids = tuple(name for name in reversed(IDENTITIES) if name in record.columns)
    wanted = [ids[0], column, *([group] if group else [])]
    return source, ids, column, tables.iter_table(folder.url, list(dict.fromkeys(wanted)))


def _any(path: str, columns: list[str]) -> Iterator[pa.Table]:
    for file in with_rows([read_footer(url) for url in expand_parquet(absolute(path))]):
        if reason := next(filter(None, map(file.without, columns)), ""):
            raise SchemaError(f"{file.url}: {reason}")
        try:
            yield from file.whole.stream(list(dict.fromkeys(columns)), READ_ROWS)
        except (pa.ArrowInvalid, OSError) as error:
            raise ManifestError(f"{file.url}: not a whole Parquet file: {error}") from error


def _as_strings(source: str, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    arrow_type = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (is_text(arrow_type) or pa.types.is_integer(arrow_type) or pa.types.is_null(arrow_type)):
        raise SchemaError(f"{source}: column {name!r}: expected strings or whole numbers, found {column.type}")
    texts, broken = as_utf8(column)
    if broken.any():
        first = texts[int(np.flatnonzero(broken)[0])].as_py()
        raise SchemaError(f"{source}: column {name!r} has {broken.sum()} strings that are not UTF-8, such as {first}")
    return texts
