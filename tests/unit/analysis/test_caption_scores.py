"""CLIPScore and RefCLIPScore by hand, and vectors found by their id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipray.analysis.caption_scores import clip_score, ref_clip_score, reference_score
from clipray.errors import SchemaError
from clipray.inputs.vector_column import open_vectors
from clipray.inputs.vector_lookup import Gatherer, Lookup, open_lookup
from clipray.job import Column
from clipray.storage.folder import Folder

EAST, NORTH, WEST = ([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0])
BETWEEN = [0.6, 0.8]


def matrix(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32).reshape(-1, 2)


def test_clip_score_by_hand() -> None:
    found = clip_score(matrix(EAST, EAST, EAST, BETWEEN), matrix(EAST, NORTH, WEST, EAST))
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx([2.5, 0, 0, 1.5])


def test_the_best_reference_counts() -> None:
    captions = matrix(EAST, NORTH, EAST, BETWEEN, WEST)
    references = matrix(NORTH, BETWEEN, NORTH, WEST, EAST, EAST)
    found = reference_score(captions, references, np.array([2, 0, 1, 2, 1]))
    assert found.dtype == np.float32
    assert np.isnan(found[1])
    assert found[[0, 2, 3, 4]].tolist() == pytest.approx([0.6, 0, 0.6, 0])
    assert np.isnan(reference_score(captions, matrix(), np.zeros(5, int))).all()


def test_ref_clip_score_is_the_harmonic_mean() -> None:
    clip, reference = np.array([1.5, 0, 2.5, 0, 1.0], np.float32), np.array([0.6, 0, 1, 0.5, np.nan], np.float32)
    found = ref_clip_score(clip, reference)
    assert found[:4].tolist() == pytest.approx([2 / (1 / 1.5 + 1 / 0.6), 0, 2 / (1 / 2.5 + 1), 0])
    assert np.isnan(found[4])


# --- vectors by id


def column(path: Path, ids: list[str | None], row_group_size: int) -> Column:
    """A Parquet of `ids` whose vectors are (n, -n, 0) of their row n."""
    rows = np.arange(len(ids), dtype=np.float64)[:, None] * np.array([[1, -1, 0]])
    table = pa.table({"name": ids, "v": pa.array(rows.tolist(), pa.list_(pa.float64()))})
    pq.write_table(table, path, row_group_size=row_group_size)
    return Column(path=str(path), column="v", id="name")


def lookup_of(path: Path, ids: list[str | None]) -> Lookup:
    return open_lookup(open_vectors(column(path, ids, 10), Folder(str(path.parent))))


def test_vectors_are_those_of_their_ids(tmp_path: Path) -> None:
    ids = [f"picture {n}" for n in range(57)]
    lookup = lookup_of(tmp_path / "v.parquet", list(ids))
    wanted = np.random.default_rng(0).integers(0, 57, 200)
    asked = [ids[n] for n in wanted]
    asked[7], asked[100] = None, "nobody"  # type: ignore[call-overload]
    found = Gatherer(lookup)(pa.chunked_array([asked[:90], asked[90:]], pa.string()))
    assert found.type == pa.list_(pa.field("element", pa.float32(), nullable=False), 3)
    for n, (vector, row) in enumerate(zip(found.to_pylist(), wanted.tolist(), strict=True)):
        assert vector == (None if n in (7, 100) else [row, -row, 0])


def test_a_hash_alone_is_no_identity(tmp_path: Path) -> None:
    lookup = lookup_of(tmp_path / "v.parquet", ["a", "b", "c"])
    other = lookup_of(tmp_path / "w.parquet", ["x", "y", "z"])
    mistaken = Lookup(lookup.vectors, other.index, other.rows)  # as if their hashes were those of a, b, c
    assert Gatherer(mistaken)(pa.chunked_array([["x", "y", "z"]])).null_count == 3


def test_an_id_that_stands_twice(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"a value of 'name' stands in two rows"):
        lookup_of(tmp_path / "v.parquet", [*(str(n) for n in range(12)), "3"])
