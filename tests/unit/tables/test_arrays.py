import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from clipray import tables

TYPES = [np.int32, np.int64, np.float16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_and_back(dtype):
    values = np.arange(10).astype(dtype)
    array = tables.number_array(values)
    assert array.equals(pa.array(values))
    for column in (
        array,
        array.slice(3, 4),
        pa.chunked_array([array, array.slice(8)]),
        pa.chunked_array([], array.type),
    ):
        expected = column.to_numpy()
        assert tables.numbers(column).dtype == expected.dtype
        np.testing.assert_array_equal(tables.numbers(column), expected)


def test_memory_is_shared():
    values = np.arange(4.0)
    assert np.shares_memory(tables.numbers(tables.number_array(values)), values)
    assert tables.number_array(values[::2]).to_pylist() == [0.0, 2.0]


def test_matrix_of_a_slice():
    vectors = tables.vector_array(np.arange(12, dtype=np.float32).reshape(4, 3), tables.vector_type(3))
    assert tables.matrix(pa.chunked_array([vectors.slice(1, 2)])).tolist() == [[3, 4, 5], [6, 7, 8]]


def test_pandas_is_not_imported():
    code = (
        "import sys, numpy as np, pyarrow as pa\nfrom clipray import tables\n"
        "x = tables.vector_array(np.ones((4, 3), np.float32), tables.vector_type(3))\n"
        "assert tables.matrix(pa.chunked_array([x])).sum() == 12\nassert 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
