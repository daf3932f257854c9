"""The door to Parquet: what is written is what the schema says, and other tools read the same values."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import ROOT

from clipray import tables
from clipray.errors import ClipRayError, DamagedError, SchemaError
from clipray.storage.folder import Folder
from clipray.storage.seals import sealed_json

WIDTH = 8
PROVENANCE = {"fingerprint": "0123456789abcdef", "model": {"name": "RN50"}, "note": "ü"}


def vectors(rows: int, seed: int = 0) -> np.ndarray:
    matrix = np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def images(rows: int, *, start: int = 0, element: str = "float32", keep: bool = False) -> pa.Table:
    """An `images` table of `rows` rows, with a vector column `clip` and on request a kept column `label`."""
    extra = [pa.field("label", pa.string())] if keep else []
    schema = tables.arrow_schema("images", {"clip": WIDTH}, element=element, extra=extra)
    kind = schema.field("clip").type
    numbers = range(start, start + rows)
    columns = {
        "image_id": pa.array([f"{n:04d}.jpg" for n in numbers]),
        "uri": pa.array([f"/photos/{n:04d}.jpg" if n % 3 else None for n in numbers], pa.string()),
        "height": pa.array([100 + n for n in numbers], pa.int32()),
        "width": pa.array([200 + n for n in numbers], pa.int32()),
        "clip": pa.FixedSizeListArray.from_arrays(
            pa.array(vectors(rows, start).astype(element).ravel(), kind.value_type), type=kind
        ),
        **({"label": pa.array([None if n % 2 else "hen" for n in numbers], pa.string())} if keep else {}),
    }
    return pa.table(columns, schema=schema)


def rejects(reason: str = "empty", stage: str = "fetch", message: str | None = "why") -> pa.Table:
    row = {"image_id": None, "uri": None, "stage": stage, "reason": reason, "message": message}
    return pa.table(
        {k: pa.array([v], pa.string()) for k, v in row.items()}, schema=tables.rejects_schema("image_id", "uri")
    )


def record(shards: list[tables.Shard], columns: pa.Schema, **other: Any) -> tables.Record:
    values: dict[str, Any] = {
        "table": "images",
        "schema_version": 1,
        "columns": {f.name: str(f.type) for f in columns},
        "rows": sum(s.rows for s in shards),
        "rejects": 0,
        "files": [asdict(s) for s in shards],
        "fingerprint": PROVENANCE["fingerprint"],
        "inputs": {},
        "settings": {},
        "provenance": {},
    }
    return tables.Record(**{**values, **other})


@pytest.fixture
def finished(tmp_path: Path) -> Folder:
    """A finished table of 30 rows in two shards."""
    folder = Folder(str(tmp_path / "images"))
    parts = {"a.parquet": images(10), "b.parquet": images(20, start=10)}
    shards = [tables.write_shard(folder, name, "images", part, PROVENANCE) for name, part in parts.items()]
    tables.write_record(folder, record(shards, images(1).schema))
    return folder


def expected() -> tuple[list[str], np.ndarray]:
    return [f"{n:04d}.jpg" for n in range(30)], np.concatenate([vectors(10), vectors(20, 10)])


# --- schemas


def test_every_schema_is_whole() -> None:
    files = {path.stem for path in (ROOT / "schemas").glob("*.json")}
    assert tables.table_names() == sorted(files - {"job.schema"})
    assert {"images", "metrics", "rejects"} < set(tables.table_names())
    for name in tables.table_names():
        spec = tables.table_schema(name)
        assert spec["table"] == name
        assert spec["version"] >= 1
        assert spec["doc"]
        for column in spec["columns"]:
            assert column["doc"].endswith(".")
            assert isinstance(column["nullable"], bool)
            assert column["type"] in {*tables.ARROW_TYPES, "vector", "any", "boxes", "strings"}
        names = [c["name"] for c in spec["columns"]]
        assert len(set(names)) == len(names)
        assert spec["key"] is None or spec["key"] in names


def test_an_unknown_table_names_the_known_ones() -> None:
    with pytest.raises(
        SchemaError,
        match=f"no table 'imges'; there are: {', '.join(tables.table_names())}",
    ):
        tables.table_schema("imges")


def test_the_arrow_schema_is_the_schema_file() -> None:
    schema = tables.arrow_schema("images", {"clip": 512, "conv": 64}, extra=[pa.field("label", pa.string())])
    assert schema.names == ["image_id", "uri", "height", "width", "clip", "conv", "label"]
    assert [f.nullable for f in schema] == [False, True, False, False, False, False, True]
    assert schema.field("height").type == pa.int32()
    assert schema.field("clip").type == pa.list_(pa.field("element", pa.float32(), nullable=False), 512)
    assert schema.field("height").metadata[b"unit"] == b"px"
    assert schema.field("image_id").metadata[b"doc"].startswith(b"Identity of the image")
    half = tables.arrow_schema("images", {"clip": 4}, element="float16").field("clip").type
    assert (half.list_size, half.value_type, half.value_field.nullable) == (4, pa.float16(), False)


# --- one shard


@pytest.mark.parametrize("element", ["float32", "float16"])
def test_a_shard_comes_back_as_it_was(tmp_path: Path, element: str) -> None:
    folder, data = Folder(str(tmp_path)), images(50, element=element, keep=True)
    shard = tables.write_shard(folder, "a.parquet", "images", data, PROVENANCE)
    payload = (tmp_path / "a.parquet").read_bytes()
    assert shard == tables.Shard("a.parquet", 50, len(payload), hashlib.sha256(payload).hexdigest())
    found = tables.read_shard(folder, "a.parquet")
    assert found.equals(data)
    assert found.schema.equals(data.schema)
    assert [f.nullable for f in found.schema] == [f.nullable for f in data.schema]
    assert tables.read_shard(folder, "a.parquet", ["label"]).column_names == ["label"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet"]


@pytest.mark.parametrize(
    ("element", "largest", "too_large"),
    [("float16", 65_504.0, 65_536.0), ("float32", 3.4e38, 1e39), ("float64", 1e300, np.inf)],
)
def test_what_fits_into_a_vector_column(element: str, largest: float, too_large: float) -> None:
    kind = tables.vector_type(2, element)
    assert tables.fits(np.array([[largest, -largest]]), kind)
    assert np.isfinite(tables.vector_array(np.array([[largest, -largest]]), kind).flatten().to_numpy()).all()
    for value in (too_large, -too_large, np.nan):
        assert not tables.fits(np.array([[1.0, value]]), kind)


def test_how_a_shard_lies_in_parquet(tmp_path: Path) -> None:
    tables.write_shard(Folder(str(tmp_path)), "a.parquet", "images", images(40_000, keep=True), PROVENANCE)
    parquet = pq.ParquetFile(tmp_path / "a.parquet")
    kind = parquet.schema_arrow.field("clip").type
    assert pa.types.is_fixed_size_list(kind)
    assert (kind.list_size, kind.value_type, kind.value_field.nullable) == (WIDTH, pa.float32(), False)
    assert [parquet.metadata.row_group(n).num_rows for n in range(parquet.num_row_groups)] == [16_384, 16_384, 7_232]
    for n in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(n)
        for column in (group.column(c) for c in range(group.num_columns)):
            assert column.compression == "ZSTD"
            vector = column.path_in_schema == "clip.list.element"
            assert ("BYTE_STREAM_SPLIT" in column.encodings) == vector
            assert column.has_dictionary_page == (not vector and column.path_in_schema != "image_id")
            assert (column.statistics is not None) == (not vector)
    assert (
        parquet.schema.column(4).max_definition_level == 1
    )  # the list's own level: neither it nor its element is nullable


def test_a_shard_says_what_made_it(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    tables.write_shard(folder, "a.parquet", "images", images(5), PROVENANCE)
    stamp = json.loads(pq.read_schema(tmp_path / "a.parquet").metadata[b"clipray"])
    assert stamp == {"table": "images", "schema_version": 1, "sealed": "sha256", **PROVENANCE}
    assert tables.provenance_of(stamp) == PROVENANCE
    rows, schema, found = tables.shard_footer(folder, "a.parquet")
    assert (rows, schema.names, found) == (5, images(1).schema.names, stamp)


def test_a_file_of_somebody_else_has_no_stamp(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "a.parquet")
    assert tables.shard_footer(Folder(str(tmp_path)), "a.parquet")[::2] == (2, {})


@pytest.mark.parametrize("keep", [0, 3, 4, 100, -1, -8, -9])
def test_a_torn_file_is_told(tmp_path: Path, keep: int) -> None:
    folder = Folder(str(tmp_path))
    tables.write_shard(folder, "a.parquet", "images", images(100), PROVENANCE)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:keep])
    with pytest.raises(SchemaError, match="not a whole Parquet file"):
        tables.read_shard(folder, "a.parquet")
    with pytest.raises(SchemaError, match="not a whole Parquet file"):
        tables.shard_footer(folder, "a.parquet")


def test_a_file_with_damaged_pages_is_told(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    tables.write_shard(folder, "a.parquet", "images", images(100), PROVENANCE)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:4] + bytes(len(whole) - 4_000) + whole[len(whole) - 3_996 :])
    with pytest.raises(SchemaError, match="not a whole Parquet file"):
        tables.read_shard(folder, "a.parquet")


def test_a_missing_file_is_missing_not_torn(tmp_path: Path) -> None:
    for read in (tables.read_shard, tables.shard_footer):
        with pytest.raises(FileNotFoundError):
            read(Folder(str(tmp_path)), "a.parquet")


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), ConnectionResetError("gone"), OSError(5, "disk")])
def test_a_file_that_cannot_be_read_now_is_not_torn(
    finished: Folder, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def fails(path: str) -> None:
        raise error

    monkeypatch.setattr("clipray.storage.parquet.pa.OSFile", fails)
    for read in (tables.read_shard, tables.shard_footer):
        with pytest.raises(ClipRayError, match=r"a.parquet: cannot be read: ") as caught:
            read(finished, "a.parquet")
        assert not isinstance(caught.value, SchemaError)


# --- check


def replaced(data: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return data.set_column(data.schema.get_field_index(name), name, values)


def test_check_takes_what_is_right() -> None:
    tables.check("images", images(5, keep=True), images(1, keep=True).schema)
    tables.check("images", images(0), images(1).schema)
    tables.check("rejects", rejects(), tables.rejects_schema("image_id", "uri"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (images(5).drop_columns(["uri"]), r"images: expected columns \['image_id', 'uri', .*found \['image_id', 'height'"),
        (images(5, keep=True), r"images: expected columns .*found .*'label'"),
        (images(5).select(["uri", "image_id", "height", "width", "clip"]), "images: expected columns"),
        (replaced(images(5), "height", pa.array(range(5), pa.int64())), "images.height: expected int32, found int64"),
        (replaced(images(5), "image_id", pa.array(["a", None, "c", None, "e"])), "images.image_id: expected no nulls, found 2 in 5 rows"),
        (images(5, element="float16"), r"images.clip: expected fixed_size_list<element: float not null>\[8\], found .*halffloat"),
    ],
)  # fmt: skip
def test_check_refuses_what_is_wrong(data: pa.Table, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        tables.check("images", data, images(1).schema)


def test_check_refuses_a_null_vector() -> None:
    kind = images(1).schema.field("clip").type
    column = pa.FixedSizeListArray.from_arrays(
        pa.array(np.zeros(16, np.float32)), type=kind, mask=pa.array([False, True])
    )
    with pytest.raises(SchemaError, match=r"images.clip: expected no nulls, found 1 in 2 rows"):
        tables.check("images", replaced(images(2), "clip", column), images(1).schema)


def test_check_refuses_what_is_not_in_a_closed_set() -> None:
    schema = tables.rejects_schema("image_id", "uri")
    with pytest.raises(SchemaError, match=r"rejects.reason: \['because'\] not in \['null_id'"):
        tables.check("rejects", rejects(reason="because"), schema)
    with pytest.raises(SchemaError, match=r"rejects.stage: \['cellar'\] not in"):
        tables.check("rejects", rejects(stage="cellar"), schema)
    with pytest.raises(SchemaError, match=r"rejects.message: expected no nulls"):
        tables.check("rejects", rejects(message=None), schema)


def test_nothing_wrong_is_written(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with pytest.raises(SchemaError, match=r"rejects.reason"):
        tables.write_shard(folder, "a.parquet", "rejects", rejects(reason="because"), {})
    assert list(tmp_path.iterdir()) == []


# --- a table


def test_a_record_comes_back(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    assert tables.read_record(folder) is None
    written = record(
        [tables.Shard("a.parquet", 1, 2)], images(1).schema, rejects_by_reason={"empty": 3}, rows_per_s=1.5
    )
    tables.write_record(folder, written)
    assert tables.read_record(folder) == written
    (tmp_path / "_table.json").write_bytes(sealed_json({**asdict(written), "of_a_later_version": 1}))
    assert tables.read_record(folder) == written


@pytest.mark.parametrize(
    "text", ['{"table": "images", "rows"', '{"table": "images"}', '{"of": "others"}', "[]", "null", "\0"]
)
def test_a_torn_record_is_told(finished: Folder, text: str) -> None:
    finished.write(tables.RECORD, text.encode())
    for read in (tables.read_record, lambda folder: tables.read_table(folder.url)):
        with pytest.raises(DamagedError, match=r"images/_table\.json is damaged, or of another version") as caught:
            read(finished)
        assert "\n" not in str(caught.value)
    assert tables.record_to_go_on(finished) is None


def test_intact_means_the_very_files(finished: Folder) -> None:
    written = tables.read_record(finished)
    assert written is not None
    assert tables.intact(finished, written)
    finished.write("_started.json", b"{}")
    finished.write("notes.txt", b"")
    assert tables.intact(finished, written)
    finished.write("c.parquet", b"")
    assert not tables.intact(finished, written)
    finished.remove("c.parquet")
    finished.write("b.parquet", b"PAR1")
    assert not tables.intact(finished, written)
    finished.remove("b.parquet")
    assert not tables.intact(finished, written)


def test_read_table(finished: Folder) -> None:
    found = tables.read_table(finished.url)
    ids, matrix = expected()
    assert found["image_id"].to_pylist() == ids
    assert np.array_equal(found["clip"].combine_chunks().flatten().to_numpy().reshape(-1, WIDTH), matrix)
    assert tables.read_table(finished.url, ["width", "image_id"]).column_names == ["width", "image_id"]
    assert [part.num_rows for part in tables.iter_table(finished.url, ["image_id"])] == [10, 20]


def test_read_table_refuses_an_unfinished_one(finished: Folder, tmp_path: Path) -> None:
    finished.remove("_table.json")
    with pytest.raises(
        SchemaError, match=r"no _table.json, so the table is not finished; finish it with `clipray run`"
    ):
        tables.read_table(finished.url)
    with pytest.raises(SchemaError, match="not finished"):
        tables.read_table(str(tmp_path / "nowhere"))


def test_read_table_refuses_an_unknown_column(finished: Folder) -> None:
    with pytest.raises(SchemaError, match="no column 'clp'; there are: image_id, uri, height, width, clip"):
        tables.read_table(finished.url, ["image_id", "clp"])


def test_read_table_refuses_a_missing_shard(finished: Folder) -> None:
    finished.remove("b.parquet")
    with pytest.raises(SchemaError, match=r"b.parquet is missing; `clipray run` makes its rows again"):
        tables.read_table(finished.url)


def test_read_table_refuses_a_torn_shard(finished: Folder) -> None:
    finished.write("b.parquet", (finished.read("b.parquet") or b"")[:-20])
    with pytest.raises(SchemaError, match=r"b.parquet: not a whole Parquet file"):
        tables.read_table(finished.url)


def test_read_table_refuses_a_shard_of_another_space(finished: Folder) -> None:
    tables.write_shard(finished, "b.parquet", "images", images(20), {**PROVENANCE, "fingerprint": "another"})
    with pytest.raises(SchemaError, match=r"b.parquet was made with other settings than the rest"):
        tables.read_table(finished.url)


def test_read_table_refuses_a_shard_with_other_columns(finished: Folder) -> None:
    tables.write_shard(finished, "b.parquet", "images", images(20, keep=True), PROVENANCE)
    with pytest.raises(SchemaError, match=r"b.parquet: expected columns"):
        tables.read_table(finished.url)


def test_a_table_without_rows_says_so(tmp_path: Path) -> None:
    tables.write_record(Folder(str(tmp_path)), record([], images(1).schema))
    with pytest.raises(SchemaError, match="the table has no rows"):
        tables.read_table(str(tmp_path))


def test_a_table_on_s3(s3: str) -> None:
    folder = Folder(f"{s3}/tables/images")
    assert folder.sizes() == {}
    shard = tables.write_shard(folder, "a.parquet", "images", images(10), PROVENANCE)
    written = record([shard], images(1).schema)
    tables.write_record(folder, written)
    assert folder.sizes().keys() == {"a.parquet", "_table.json"}
    assert tables.intact(folder, written)
    assert tables.read_table(folder.url).equals(images(10))
    folder.remove("a.parquet")
    with pytest.raises(SchemaError, match=r"a.parquet is missing"):
        tables.read_table(folder.url)


# --- read by others: the nearest neighbours of row 7, computed here and asked of each tool


def nearest() -> tuple[list[str], list[float]]:
    ids, matrix = expected()
    cosines = matrix @ matrix[7]
    order = np.argsort(-cosines)[:5]
    return [ids[n] for n in order], cosines[order].tolist()


def test_pyarrow_reads_the_folder(finished: Folder) -> None:
    import pyarrow.dataset as ds

    found = ds.dataset(finished.url, format="parquet").to_table()  # files that start with _ are passed over
    ids, matrix = expected()
    assert found["image_id"].to_pylist() == ids
    assert np.array_equal(np.array(found["clip"].to_pylist(), np.float32), matrix)


@pytest.mark.parametrize(
    "cosine",
    [
        "list_cosine_similarity(clip::FLOAT[], query::FLOAT[])",
        "array_cosine_similarity(clip::FLOAT[8], query::FLOAT[8])",
    ],
)
def test_duckdb_searches_the_folder(finished: Folder, cosine: str) -> None:
    import duckdb

    with duckdb.connect() as connection:
        found = connection.execute(
            f"""
            WITH images AS (FROM read_parquet('{finished.url}/*.parquet')),
                 asked AS (SELECT clip AS query FROM images WHERE image_id = '0007.jpg')
            SELECT image_id, {cosine} AS cosine FROM images, asked ORDER BY cosine DESC LIMIT 5
            """
        ).fetchall()
        sizes = connection.execute(
            f"SELECT sum(height), sum(width), count(uri) FROM '{finished.url}/*.parquet'"
        ).fetchone()
    ids, cosines = nearest()
    assert [row[0] for row in found] == ids
    assert np.allclose([row[1] for row in found], cosines, atol=1e-6)
    assert sizes == (100 * 30 + 435, 200 * 30 + 435, 20)


@pytest.mark.parametrize("scan", [True, False])
def test_polars_searches_the_folder(finished: Folder, scan: bool) -> None:
    import polars as pl

    glob = f"{finished.url}/*.parquet"
    frame = pl.scan_parquet(glob) if scan else pl.read_parquet(glob).lazy()
    assert frame.collect_schema()["clip"] == pl.Array(pl.Float32, WIDTH)
    query = frame.filter(pl.col("image_id") == "0007.jpg").collect()["clip"].to_numpy()[0]
    parts = [pl.col("clip").arr.get(n) * float(query[n]) for n in range(WIDTH)]
    norm = pl.col("clip").arr.to_list().list.eval(pl.element() ** 2).list.sum().sqrt()
    cosine = (pl.sum_horizontal(parts) / norm).alias("cosine")
    found = frame.select("image_id", cosine).sort("cosine", descending=True).head(5).collect()
    ids, cosines = nearest()
    assert found["image_id"].to_list() == ids
    assert np.allclose(found["cosine"].to_numpy(), cosines, atol=1e-6)


def test_pandas_reads_the_folder(finished: Folder) -> None:
    import pandas as pd

    frame = pd.concat([pd.read_parquet(p) for p in sorted(Path(finished.url).glob("*.parquet"))]).set_index("image_id")
    matrix = np.stack(frame["clip"].to_numpy())
    assert matrix.dtype == np.float32
    assert np.array_equal(matrix, expected()[1])
    cosines = pd.Series(matrix @ frame.loc["0007.jpg", "clip"], frame.index).nlargest(5)
    ids, values = nearest()
    assert cosines.index.tolist() == ids
    assert np.allclose(cosines, values, atol=1e-6)
    assert frame["uri"].isna().sum() == 10
