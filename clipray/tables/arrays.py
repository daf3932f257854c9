"""Numbers between Arrow and NumPy, over the same memory.

`pa.array` and `to_numpy` do it too, but import pandas first, which takes 0.4 s of each process.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def number_array(values: np.ndarray) -> pa.Array:
    """Numbers (n,) of an Arrow array without nulls."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def numbers(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The values (n,) of a column of numbers without nulls, read-only."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [np.from_dlpack(chunk) for chunk in chunks]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, column.type.to_pandas_dtype()), *parts])


def vector_array(matrix: np.ndarray, column_type: pa.FixedSizeListType) -> pa.Array:
    """(n, d) -> vector column of n rows."""
    values = np.asarray(matrix, column_type.value_type.to_pandas_dtype()).ravel()
    return pa.FixedSizeListArray.from_arrays(number_array(values), type=column_type)


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Vector column of n rows -> (n, d), of the column's own float type."""
    return numbers(column.combine_chunks().flatten()).reshape(-1, column.type.list_size)
