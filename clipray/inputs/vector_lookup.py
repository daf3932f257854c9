"""Vectors by id: the position of each row of a vector column, and a reader of wanted rows, row group by row group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipray import tables
from clipray.errors import SchemaError
from clipray.inputs.key_index import ABSENT, KeyIndex, hash_strings, seed_of
from clipray.inputs.vector_column import VectorColumn, read_ids, read_vectors

SEEDS = tuple(seed_of("lookup", attempt) for attempt in range(3))


@dataclass(frozen=True)
class Lookup:
    """The position of each id's vector, in 16 bytes a row.

    Attributes:
        index: of the ids, no two of which collide.
        rows: (n,) int64 row in the whole column, in the order of `index`.
    """

    vectors: VectorColumn
    index: KeyIndex
    rows: np.ndarray


def open_lookup(vectors: VectorColumn) -> Lookup:
    """Read the ids of a column. Raises SchemaError: an id stands there twice."""
    for seed in SEEDS:
        keys = [hash_strings(read_ids(vectors, row_group), seed) for row_group in vectors.row_groups]
        index, rows = KeyIndex.of(np.concatenate(keys), seed)
        if not index.repeats:
            return Lookup(vectors, index, rows)
    raise SchemaError(
        f"input {vectors.name}: a value of {vectors.ids[-1]!r} stands in two rows; each should have one vector: drop the others"
    )


class Gatherer:
    """Gathers vectors by id, block by block. Holds one row group of the table: the last one read."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._starts = np.array([row_group.first_row for row_group in lookup.vectors.row_groups])
        self._held: tuple[int, pa.ChunkedArray, np.ndarray] | None = None

    def __call__(self, ids: pa.ChunkedArray) -> pa.Array:
        """(m,) ids -> fixed_size_list<float32> of m rows, null for unknown ids."""
        lookup = self._lookup
        positions = lookup.index.positions(ids)
        known = positions != ABSENT
        rows = lookup.rows[positions]
        owners = np.where(known, np.searchsorted(self._starts, rows, side="right") - 1, ABSENT)
        matrix = np.zeros((len(ids), lookup.vectors.n_features), np.float32)
        for number in np.unique(owners[known]).tolist():
            names, x = self._read(number)
            mine = np.flatnonzero(owners == number)
            within = rows[mine] - self._starts[number]
            matrix[mine] = x[within]
            known[mine] = pc.equal(
                names.take(pa.array(within)), ids.take(pa.array(mine))
            ).to_numpy()  # not the hash alone
        values, column_type = tables.number_array(matrix.ravel()), tables.vector_type(lookup.vectors.n_features)
        return pa.FixedSizeListArray.from_arrays(values, type=column_type, mask=pa.array(~known))

    def _read(self, number: int) -> tuple[pa.ChunkedArray, np.ndarray]:
        if self._held is None or self._held[0] != number:
            self._held = None  # the last one goes before the next one comes
            vectors = self._lookup.vectors
            ids, x = read_vectors(vectors, vectors.row_groups[number])
            self._held = number, ids[vectors.ids[-1]], x
        return self._held[1], self._held[2]
