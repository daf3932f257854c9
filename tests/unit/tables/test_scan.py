"""Lazy frames over tables: the values of `read_table`, and its errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from clipray import tables
from clipray.errors import SchemaError
from clipray.storage.folder import Folder
from clipray.tables.scan import scan_shards, scan_table

SCHEMA = pa.schema([pa.field("image_id", pa.string(), nullable=False), *tables.arrow_schema("clusters")])


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Three shards of ten rows, finished."""
    folder, stamp = Folder(str(tmp_path / "clusters")), {"fingerprint": "f"}
    shards = []
    for n in range(3):
        rows = [{"image_id": f"{10 * n + k:02d}", "cluster_id": k % 4, "distance": k / 10} for k in range(10)]
        data = pa.Table.from_pylist(rows, schema=SCHEMA)
        shards.append(tables.write_shard(folder, f"part-{n}.parquet", "clusters", data, stamp))
    facts = {"inputs": {}, "settings": {}, "provenance": stamp, "finished_at": tables.now()}
    tables.commit(folder, "clusters", SCHEMA, shards, fingerprint="f", **facts)
    return folder


@pytest.mark.parametrize("engine", ["streaming", "in-memory"])
def test_a_scan_has_the_rows_of_the_table_in_their_order(folder: Folder, engine: pl.EngineType) -> None:
    frame, table = scan_table(folder.url), tables.read_table(folder.url)
    assert frame.collect(engine=engine).equals(pl.DataFrame(table))
    assert frame.select("distance", "image_id").collect(engine=engine).columns == ["distance", "image_id"]
    assert frame.filter(pl.col("cluster_id") == 3).select("image_id").collect(engine=engine)["image_id"].to_list() == [
        row["image_id"] for row in table.to_pylist() if row["cluster_id"] == 3
    ]
    assert frame.head(13).collect(engine=engine).equals(pl.DataFrame(table)[:13])
    assert frame.filter(pl.col("cluster_id") == 3).head(3).collect(engine=engine).height == 3
    assert frame.select(pl.len()).collect(engine=engine).item() == 30


@pytest.mark.parametrize("engine", ["streaming", "in-memory"])
def test_groups_are_those_of_numpy(folder: Folder, engine: pl.EngineType) -> None:
    counts = scan_table(folder.url).group_by("cluster_id").len().sort("cluster_id").collect(engine=engine)
    numbers = tables.read_table(folder.url)["cluster_id"].to_numpy()
    assert np.array_equal(counts["len"], np.bincount(numbers))


def test_shards_of_an_unfinished_table_can_be_read(folder: Folder) -> None:
    folder.remove(tables.RECORD)
    names = tables.shard_names(folder)
    assert scan_shards(folder, names[1:]).select(pl.len()).collect().item() == 20
    with pytest.raises(SchemaError, match="the table is not finished"):
        scan_table(folder.url)


def test_a_column_that_is_not_there_is_our_error(folder: Folder) -> None:
    with pytest.raises(SchemaError, match="no column 'label'; there are: image_id, cluster_id, distance"):
        scan_table(folder.url, ["image_id", "label"])


@pytest.mark.parametrize("name", ["part-0.parquet", "part-2.parquet"])
def test_a_missing_shard_is_our_error(folder: Folder, name: str) -> None:
    folder.remove(name)
    with pytest.raises(SchemaError, match=rf"{name} is missing; `clipray run` makes its rows again"):
        scan_table(folder.url).collect()


def test_a_torn_shard_is_our_error(folder: Folder) -> None:
    folder.write("part-1.parquet", folder.read("part-1.parquet")[:-9])  # type: ignore[index]
    with pytest.raises(SchemaError, match="not a whole Parquet file"):
        scan_table(folder.url).collect()


def test_a_table_without_rows_has_its_columns(folder: Folder) -> None:
    facts = {"inputs": {}, "settings": {}, "provenance": {}, "finished_at": tables.now()}
    tables.commit(folder, "clusters", SCHEMA, [], fingerprint="f", **facts)
    frame = scan_table(folder.url).filter(pl.col("image_id") == "00").select("image_id", "cluster_id").collect()
    assert (frame.columns, frame.height) == (["image_id", "cluster_id"], 0)
