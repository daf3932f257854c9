"""Columns of a run's tables, aligned with the rows of an index."""

from __future__ import annotations

import datetime
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from clipray import tables
from clipray.errors import JobError, SchemaError
from clipray.queries import row_columns
from clipray.queries.facets import Facet
from clipray.queries.run_columns import _key_of
from clipray.queries.searcher import Searcher
from clipray.storage.folder import Folder


@pytest.fixture
def searcher(queried_run: str) -> Searcher:
    return Searcher(queried_run, "index")


def names(searcher: Searcher, where: str) -> set[str]:
    rows = searcher.columns.rows(np.flatnonzero(searcher.columns.mask(where)), ["image_id"])
    return {row["image_id"] for row in rows}


def test_columns_are_called_by_their_bare_names_where_these_are_unique(searcher: Searcher) -> None:
    assert {name: str(dtype) for name, dtype in searcher.columns.schema.items()} == {
        "image_id": "String", "uri": "String", "height": "Int32", "width": "Int32", "colour": "String", "weight": "Float64",
        "label": "String", "taken": "Date", "labels.label": "String", "probability": "Float32", "margin": "Float32",
        "label_photo": "String", "probability_photo": "Float32", "margin_photo": "Float32", "cluster_id": "Int32",
        "distance": "Float32", "group_id": "Int64", "keeper_id": "String", "kept": "Boolean", "similarity": "Float32",
        "nearest": "Float32", "text": "String",
    }  # fmt: skip


def test_values_are_those_of_the_rows_own_id(searcher: Searcher) -> None:
    columns = [
        "image_id",
        "width",
        "colour",
        "taken",
        "labels.label",
        "labels.label_photo",
        "probability",
        "cluster_id",
        "kept",
    ]
    for row in searcher.columns.rows(range(61), columns):
        if row["image_id"] == "unknown":
            assert row == {**dict.fromkeys(columns), "image_id": "unknown", "kept": True}
            continue
        n = int(row.pop("image_id").removesuffix(".jpg"))
        assert row.pop("probability") == pytest.approx(n / 60)
        assert row == {
            "width": 100 + n, "colour": ["red", "blue", None][n % 3],
            "taken": datetime.date(1970, 1, 1) + datetime.timedelta(100 * n),
            "labels.label": "cat", "labels.label_photo": ["cat", "dog"][n % 2], "cluster_id": n % 4, "kept": n != 5,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("where", "numbers"),
    [
        ("width > 157", [58, 59]),
        ("images.width >= 100 AND width < 102", [0, 1]),
        ("label = 'dog' and labels.label = 'cat' and width < 104", [1, 3]),
        ("images.label = 'dog' and label_photo = images.label and width < 104", [1, 3]),
        ("colour is null and width < 106", [2, 5]),
        ("not kept", [5]),
        ("group_id = 0", [1, 5]),
        ("colour like 'r%' and cluster_id = 0 and width < 120", [0, 12]),
        ("taken < date '1970-05-01'", [0, 1]),
        ("image_id = '7.jpg'", [7]),
        ("FALSE", []),
    ],
)
def test_filters(searcher: Searcher, where: str, numbers: list[int]) -> None:
    assert names(searcher, where) == {f"{n}.jpg" for n in numbers}


def test_the_texts_of_an_image_are_lines(searcher: Searcher) -> None:
    assert names(searcher, "text LIKE '%second%3%'") == {"3.jpg"}
    numbers = [searcher.row_numbers.number(name) for name in ("2.jpg", "9.jpg")]
    assert searcher.columns.rows(numbers, ["texts.text"]) == [
        {"texts.text": "first caption 2\nsecond caption 2"},
        {"texts.text": None},
    ]


def test_a_filter_of_no_column_is_of_all_rows(searcher: Searcher) -> None:
    mask = searcher.columns.mask("1 = 1")
    assert mask.shape == (61,)
    assert mask.all()
    assert searcher.columns.mask("1 = 1") is mask


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("colur = 'red'", "no column 'colur', found: .*; did you mean 'colour'?"),
        ("tags = 'a'", "column 'tags' holds lists"),
        ("images.clip = 1", "no column 'images.clip'"),
        ("width", "'width' is of type Int32; expected a condition"),
        ("width = 'a'", "cannot compare string with numeric type"),
        ("CAST(colour AS INT) = 1", "conversion from `str` to `i32` failed"),
        ("regexp_like(colour, '(')", "unclosed group"),
    ],
)
def test_what_is_wrong_is_one_line(searcher: Searcher, where: str, message: str) -> None:
    with pytest.raises(JobError, match=message) as caught:
        searcher.columns.mask(where)
    assert "\n" not in str(caught.value)


def test_facets(searcher: Searcher) -> None:
    facets = searcher.columns.facets(mask=searcher.columns.mask("width < 112"))
    assert facets["colour"].values == (("blue", 4), ("red", 4))  # of equally many the first by name
    assert (facets["colour"].rows, facets["colour"].nulls, facets["colour"].n_values) == (8, 4, 2)
    assert facets["cluster_id"] == Facet(12, 0, facets["cluster_id"].values, 4, 0, 3)
    assert dict(facets["cluster_id"].values) == {0: 3, 1: 3, 2: 3, 3: 3}
    assert (facets["weight"].rows, facets["weight"].nulls, facets["weight"].low, facets["weight"].high) == (
        11,
        1,
        0.5,
        5.5,
    )
    assert len(facets["weight"].bins) == 20
    assert sum(facets["weight"].bins) == 11
    assert facets["taken"].high == datetime.date(1970, 1, 1) + datetime.timedelta(1100)
    assert dict(facets["kept"].values) == {True: 11, False: 1}
    assert not {"uri", "image_id", "text"} & facets.keys()
    assert "images.uri" not in searcher.columns._held  # nor is it read
    assert searcher.columns.facets(["uri"], top=3)["uri"].n_values == 59
    assert searcher.columns.facets(["labels.label"])["labels.label"] == Facet(60, 1, (("cat", 60),), 1)


def test_pages_of_rows(searcher: Searcher) -> None:
    mask = searcher.columns.mask("colour = 'red'")
    frame = searcher.columns.frame(["width", "colour"], mask=mask, sort="width", descending=True, offset=1, limit=2)
    assert frame.equals(pl.DataFrame({"width": pl.Series([154, 151], dtype=pl.Int32), "colour": ["red", "red"]}))
    assert searcher.columns.frame(sort="colour").height == 61
    assert searcher.columns.frame(["colour"], sort="colour")["colour"][-1] is None


def test_little_is_held(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_columns, "HELD_BYTES", 700)
    columns = searcher.columns
    for where in ("width > 1", "height > 1", "colour = 'red'", "cluster_id > 1", "weight > 1"):
        columns.mask(where)
    held = columns._held
    assert list(held)[-1] == "images.weight"
    assert sum(series.estimated_size() for series in held.values()) <= 700
    assert columns._loaded(columns.columns.resolve("colour")).dtype == pl.Enum
    for n in range(2 * row_columns.MASKS):
        columns.mask(f"width > {n}")
    assert len(columns._masks) == row_columns.MASKS


def test_rows_of_regions_have_columns_of_their_images(queried_run: str) -> None:
    searcher = Searcher(queried_run, by_region=True)
    assert {"image_id", "region_id", "scale", "clipped", "width", "colour"} <= searcher.columns.schema.keys()
    assert "cluster_id" in searcher.columns.schema
    rows = searcher.columns.rows(np.flatnonzero(searcher.columns.mask("width = 103")), ["region_id", "scale", "width"])
    assert rows == [
        {"region_id": "3.jpg#g0", "scale": 0, "width": 103},
        {"region_id": "3.jpg#g1", "scale": 1, "width": 103},
    ]


def test_a_table_that_cannot_be_read_is_told_where_it_is_needed(queried_run: str, tmp_path: Path) -> None:
    run = shutil.copytree(queried_run, tmp_path / "run")
    (run / "labels" / "part-000001.parquet").unlink()
    (run / "clusters" / "_table.json").write_text("{")
    (run / "duplicates" / "part-000000.parquet").write_bytes(b"PAR1")
    searcher = Searcher(str(run), "index")
    assert names(searcher, "width < 102") == {"0.jpg", "1.jpg"}
    with pytest.raises(
        SchemaError, match=r"no column 'cluster_id'; it may be of a table that cannot be read: .*duplicates"
    ):
        searcher.columns.mask("cluster_id = 1")
    with pytest.raises(SchemaError, match=r"labels: part-000001\.parquet is missing"):
        searcher.columns.mask("label_photo = 'cat'")


def test_a_kept_column_may_be_called_like_another_id(queried_run: str) -> None:
    output = Folder(queried_run)
    record = tables.read_record(output.sub("images"))
    assert record is not None
    assert _key_of(replace(record, columns={**record.columns, "text_id": "string"})) == "image_id"
