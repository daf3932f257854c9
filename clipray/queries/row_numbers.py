"""The numbers of an index's rows by id: hashes instead of a million strings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clipray.inputs.key_index import ABSENT, KeyIndex, hash_strings, seed_of

SEED = seed_of("rows of an index")


@dataclass(frozen=True, eq=False)
class RowNumbers:
    """Finds rows by id, in 12 bytes a row.

    Attributes:
        ids: (n,) strings, the id of each row; rows may share one.
        keys: of the distinct ids, u <= n.
        key_of_row: (n,) int32, the place of each row's id among the keys.
    """

    ids: pa.ChunkedArray
    keys: KeyIndex
    key_of_row: np.ndarray

    @classmethod
    def of(cls, ids: pa.ChunkedArray) -> RowNumbers:
        hashes, key_of_row = np.unique(hash_strings(ids, SEED), return_inverse=True)
        return cls(ids, KeyIndex(hashes, SEED), key_of_row.astype(np.int32))

    def number(self, row_id: str) -> int | None:
        """The number of the first row with this id; None where there is none."""
        place = self.keys.positions(pa.array([row_id], pa.string()))[0]
        if place == ABSENT:
            return None
        rows = np.flatnonzero(self.key_of_row == place).tolist()
        return next((row for row in rows if self.ids[row].as_py() == row_id), None)  # not the hash alone
