"""Regions as rows: given boxes sorted out, the grid in the picture's own pixels, and nested columns there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from clipray import tables
from clipray.engine import sink
from clipray.inputs.committed_rows import RegionFolders
from clipray.models.geometry import Geometry, geometry
from clipray.models.pooling import region_grid
from clipray.pipelines.region_boxes import (
    Boxes,
    ImageRegions,
    box_regions,
    grid_regions,
    joined,
    region_columns,
    sort_boxes,
    unfolded,
)
from clipray.storage.folder import Folder

SQUARE = {"size": [64, 64], "resize_mode": "shortest"}
WIDE = geometry(100, 200, SQUARE)
"""100 x 200 px (height x width) -> 64 x 128 px, of which the crop shows 64: 50 … 150 px of the original's width."""


# --- given boxes


def test_good_boxes_keep_their_place_and_their_coordinates() -> None:
    found = sort_boxes([[60, 10, 90, 30], [50.0, 0.0, 150.0, 100.0]], WIDE)
    assert found.number.tolist() == [0, 1]
    assert found.original.dtype == found.on_input.dtype == np.float32
    assert found.original.tolist() == [[60, 10, 90, 30], [50, 0, 150, 100]]
    assert found.clipped.tolist() == [False, False]
    # 0.64 px of the input a px of the picture, and 32 px of it cut away on the left
    np.testing.assert_allclose(found.on_input, [[6.4, 6.4, 25.6, 19.2], [0, 0, 64, 64]], atol=1e-5)
    assert found.rejected == []


@pytest.mark.parametrize("given", [None, [], ()])
def test_no_boxes(given: Any) -> None:
    found = sort_boxes(given, WIDE)
    assert (len(found.number), found.original.shape, found.on_input.shape, found.rejected) == (0, (0, 4), (0, 4), [])


@pytest.mark.parametrize(
    ("box", "original", "on_input"),
    [
        ([-5, -1, 100, 50], [0, 0, 100, 50], [0, 0, 32, 32]),
        ([100, 50, 1e6, 1e6], [100, 50, 200, 100], [32, 32, 64, 64]),
        ([-1, -1, 201, 101], [0, 0, 200, 100], [0, 0, 64, 64]),
        ([199.5, 0, 200.5, 100], None, None),  # clipped, but outside the crop
    ],
)
def test_boxes_over_the_edge_are_clipped(
    box: list[float], original: list[float] | None, on_input: list[float] | None
) -> None:
    found = sort_boxes([box], WIDE)
    if original is None:
        assert [reason for _, reason, _ in found.rejected] == ["outside_crop"]
        return
    assert (found.number.tolist(), found.original.tolist()) == ([0], [original])
    assert found.clipped.tolist() == [True]
    np.testing.assert_allclose(found.on_input, [on_input], atol=1e-4)


def test_a_box_in_the_crop_and_one_half_in_it() -> None:
    """The crop cuts what the network sees, not the row's box: that says what was given."""
    found = sort_boxes([[0, 0, 100, 100]], WIDE)
    assert found.original.tolist() == [[0, 0, 100, 100]]
    assert not found.clipped.any()
    np.testing.assert_allclose(found.on_input, [[0, 0, 32, 64]], atol=1e-4)


NO_NUMBERS = "expected four finite numbers x1, y1, x2, y2 in px"
TURNED = "expected x1 < x2 and y1 < y2"
OUTSIDE = "it lies outside the image of 100 x 200 px (height x width)"
CROPPED = "the network's centre crop of the image shows nothing of it"


@pytest.mark.parametrize(
    ("box", "reason", "why"),
    [
        ([10, 10, 10, 20], "empty_box", TURNED),
        ([10, 20, 30, 20], "empty_box", TURNED),
        ([90, 10, 60, 30], "empty_box", TURNED),
        ([200, 0, 210, 10], "empty_box", OUTSIDE),
        ([0, -20, 10, 0], "empty_box", OUTSIDE),
        ([-9, 0, -1, 10], "empty_box", OUTSIDE),
        ([float("nan"), 0, 10, 10], "empty_box", NO_NUMBERS),
        ([0, 0, float("inf"), 10], "empty_box", NO_NUMBERS),
        ([0, 0, None, 10], "empty_box", NO_NUMBERS),
        ([0, 0, 10], "empty_box", NO_NUMBERS),
        ([0, 0, 10, 10, 1], "empty_box", NO_NUMBERS),
        ([], "empty_box", NO_NUMBERS),
        (None, "empty_box", NO_NUMBERS),
        ([0, 0, 1e300, 10], "empty_box", NO_NUMBERS),  # no float32 holds it
        ([60, 10, 60.000001, 20], "empty_box", TURNED),  # nor this difference
        ([0, 0, 50, 100], "outside_crop", CROPPED),
        ([150, 0, 200, 100], "outside_crop", CROPPED),
    ],
)
def test_a_box_with_nothing_in_it_is_refused_with_the_reason(box: Any, reason: str, why: str) -> None:
    found = sort_boxes([[60, 10, 90, 30], box, [60, 10, 90, 30]], WIDE)
    assert found.number.tolist() == [0, 2]
    assert found.rejected == [(1, reason, f"box 1 {box}: {why}")]
    assert np.isfinite(found.original).all()
    assert np.isfinite(found.on_input).all()


def test_only_bad_boxes() -> None:
    found = sort_boxes([None, [5, 5, 5, 5], [0, 0, 10, 10]], WIDE)
    assert (len(found.number), found.on_input.shape) == (0, (0, 4))
    assert [(n, reason) for n, reason, _ in found.rejected] == [(0, "empty_box"), (1, "empty_box"), (2, "outside_crop")]


def test_without_a_crop_every_box_inside_is_seen() -> None:
    for picture in (geometry(100, 200, {**SQUARE, "resize_mode": "squash"}), geometry(100, 200, {}, (128, 16))):
        found = sort_boxes([[0, 0, 1, 1], [199, 99, 200, 100], [0, 0, 200, 100]], picture)
        assert found.number.tolist() == [0, 1, 2]
        assert found.on_input[2].tolist() == [0, 0, picture.input_width, picture.input_height]


# --- a picture's regions


def grid_boxes(picture: Geometry, cells: tuple[int, int], levels: int = 2) -> ImageRegions:
    grid = region_grid(*cells, levels)
    input_px = (picture.input_height, picture.input_width)
    return grid_regions(picture, cells, input_px, grid, np.zeros((len(grid), 3), np.float32))


def test_the_grid_of_a_wide_picture_by_hand() -> None:
    """4 cells of 16 px a side over the crop, which is 100 px of the picture from 50: a cell is 25 px of it.

    Scale 1: the crop. Scale 2: squares of floor(8 / 3) = 2 cells at 0 and 2.
    """
    found = grid_boxes(WIDE, (4, 4))
    assert found.names == ["g0", "g1", "g2", "g3", "g4"]
    assert found.scales.tolist() == [1, 2, 2, 2, 2]
    assert found.boxes.dtype == np.float32
    np.testing.assert_allclose(
        found.boxes,
        [[50, 0, 150, 100], [50, 0, 100, 50], [100, 0, 150, 50], [50, 50, 100, 100], [100, 50, 150, 100]],
        atol=1e-4,
    )
    assert not found.clipped.any()


def test_the_grid_of_a_tall_picture_by_hand() -> None:
    """320 x 128 px -> 160 x 64 px, of which 48 px are cut away above: 96 px of the original. A cell is 32 px of it."""
    found = grid_boxes(geometry(320, 128, SQUARE), (4, 4))
    np.testing.assert_allclose(
        found.boxes,
        [[0, 96, 128, 224], [0, 96, 64, 160], [64, 96, 128, 160], [0, 160, 64, 224], [64, 160, 128, 224]],
        atol=1e-4,
    )


def test_the_grid_of_a_picture_that_keeps_its_aspect_by_hand() -> None:
    """90 x 180 px -> 64 x 128 px, 4 x 8 cells. w = 4, 4 to spare: m = 3 overlaps by 1/2, m = 2 by 0: m = 3.

    Scale 1: squares of 4 cells at 0, 2, 4. A cell is 22.5 px of the original, both ways.
    """
    found = grid_boxes(geometry(90, 180, {}, (128, 16)), (4, 8), levels=1)
    np.testing.assert_allclose(found.boxes, [[0, 0, 90, 90], [45, 0, 135, 90], [90, 0, 180, 90]], atol=1e-4)


def test_regions_of_nothing_but_padding_are_no_rows() -> None:
    """25 x 100 px is padded to 64 x 64 px: 16 px of picture between 24 px of white above and below, in 8 cells of 8 px.

    Scale 3 has squares of 4 cells at 0, 2 and 4; scale 5 of 2 cells at 0, 1, 3, 4, 6: rows 0, 1 and 6 show padding alone.
    """
    picture = geometry(25, 100, {**SQUARE, "resize_mode": "longest"})
    assert (picture.top, picture.left) == (-24, 0)
    grid = region_grid(8, 8, 5)
    vectors = np.arange(len(grid), dtype=np.float32)[:, None]
    found = grid_regions(picture, (8, 8), (64, 64), grid, vectors)
    seen = [n for n, (_, top, _, bottom, _) in enumerate(grid.tolist()) if top < 5 and bottom > 3]
    assert 0 < len(seen) < len(grid)
    assert found.names == [f"g{n}" for n in seen]  # a region keeps its name, whatever else is left out
    assert found.vectors[:, 0].tolist() == seen
    assert found.boxes[0].tolist() == [0, 0, 100, 25]
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()


def test_what_patches_leave_unread_is_in_no_region() -> None:
    """60 px in patches of 14: cells divide 56 px of the input, which are 112 of the picture's 120 px."""
    picture = geometry(120, 120, {"size": [60, 60]})
    grid = region_grid(4, 4, 1)
    found = grid_regions(picture, (4, 4), (56, 56), grid, np.zeros((1, 2), np.float32))
    np.testing.assert_allclose(found.boxes, [[0, 0, 112, 112]], atol=1e-4)


def test_grid_and_given_boxes_together() -> None:
    boxes = sort_boxes([[60, 10, 90, 30], [5, 5, 5, 5], [100, 50, 300, 100]], WIDE)
    grid = region_grid(4, 4, 1)
    of_grid = grid_regions(WIDE, (4, 4), (64, 64), grid, np.full((1, 2), 7, np.float32))
    found = joined([of_grid, box_regions(boxes, np.array([[1, 1], [2, 2]], np.float32))])
    assert found.names == ["g0", "b0", "b2"]
    assert found.scales.tolist() == [1, 0, 0]
    assert found.clipped.tolist() == [False, False, True]
    assert found.vectors.tolist() == [[7, 7], [1, 1], [2, 2]]
    np.testing.assert_allclose(found.boxes, [[50, 0, 150, 100], [60, 10, 90, 30], [100, 50, 200, 100]], atol=1e-4)
    assert [n for n, _, _ in found.rejected] == [1]


def test_boxes_alone_and_none_of_them_good() -> None:
    found = joined([box_regions(sort_boxes([[0, 0, 0, 0]], WIDE), np.zeros((0, 2), np.float32))])
    assert (found.names, found.boxes.shape, found.vectors.shape) == ([], (0, 4), (0, 2))
    assert [reason for _, reason, _ in found.rejected] == ["empty_box"]


# --- nested columns


def some(names: list[str], seed: int = 0, refused: tuple[tuple[int, str, str], ...] = ()) -> ImageRegions:
    rng, count = np.random.default_rng(seed), len(names)
    scales = np.array([int(name.startswith("g")) * 2 for name in names], np.int32)
    return ImageRegions(
        names,
        rng.uniform(0, 9, (count, 4)).astype(np.float32),
        scales,
        rng.random(count) < 0.5,
        rng.normal(size=(count, 3)).astype(np.float32),
        list(refused),
    )


def block(rows: list[ImageRegions | None], element: str = "float32") -> tuple[pa.Table, pa.Schema]:
    schema = tables.arrow_schema("regions", {"conv": 3}, element=element)
    ids = [f"p{n}" for n in range(len(rows))]
    columns = region_columns(ids, rows, schema)
    assert list(columns) == ["region_count", "regions", "rejected_boxes"]
    named = {"image_id": pa.array(ids, pa.string()), "uri": pa.array([f"/{i}" for i in ids], pa.string())}
    return pa.table({**named, **columns}), schema


ROWS: list[ImageRegions | None] = [
    some(["g0", "g1", "b0"], 1),
    None,  # a picture that was refused
    some([], 2),
    some(["b1"], 3, ((0, "empty_box", "box 0 [1, 1, 1, 1]: empty"), (2, "outside_crop", "box 2"))),
    some([], 4, ((0, "empty_box", "box 0 None"),)),
]


def test_there_and_back() -> None:
    data, _ = block(ROWS)
    assert data["region_count"].to_pylist() == [3, None, 0, 1, 0]
    rows = unfolded(data, "regions")
    assert rows["image_id"].to_pylist() == ["p0", "p0", "p0", "p3"]
    assert rows["uri"].to_pylist() == ["/p0", "/p0", "/p0", "/p3"]
    assert rows["region_id"].to_pylist() == ["p0#g0", "p0#g1", "p0#b0", "p3#b1"]
    assert rows["scale"].to_pylist() == [2, 2, None, None]
    found = [row for row in ROWS if row is not None]
    for name, column in (("box_xyxy", "boxes"), ("conv", "vectors"), ("clipped", "clipped")):
        expected = np.concatenate([getattr(row, column) for row in found])
        assert np.array_equal(np.array(rows[name].to_pylist(), expected.dtype), expected)


def test_rejected_boxes_there_and_back() -> None:
    rows = unfolded(block(ROWS)[0], "rejected_boxes")
    assert rows.select(["image_id", "region_id", "reason"]).to_pylist() == [
        {"image_id": "p3", "region_id": "p3#b0", "reason": "empty_box"},
        {"image_id": "p3", "region_id": "p3#b2", "reason": "outside_crop"},
        {"image_id": "p4", "region_id": "p4#b0", "reason": "empty_box"},
    ]
    assert rows["message"].to_pylist() == ["box 0 [1, 1, 1, 1]: empty", "box 2", "box 0 None"]


@pytest.mark.parametrize("element", ["float32", "float16"])
def test_types_are_those_of_the_schema(element: str) -> None:
    data, schema = block(ROWS, element)
    assert [(c["name"], c["nullable"]) for c in tables.table_schema("regions")["columns"]] == [
        ("image_id", False), ("region_id", False), ("box_xyxy", False), ("scale", True), ("clipped", False), ("<feature>", False),
        ("<box_id>", True), ("<caption>", True), ("<label>", True),
    ]  # fmt: skip
    rows = unfolded(data, "regions").select(schema.names)
    assert rows.schema.types == schema.types
    assert schema.field("conv").type == tables.vector_type(3, element)
    assert schema.field("box_xyxy").type == tables.vector_type(4)
    tables.check("regions", pa.table(rows.columns, schema=schema), schema)
    reasons = next(c["values"] for c in tables.table_schema("rejects")["columns"] if c["name"] == "reason")
    assert {"empty_box", "outside_crop"} <= set(reasons)


@pytest.mark.parametrize("rows", [[], [None], [None, None], [some([])], [None, some([])]], ids=str)
def test_blocks_without_a_region(rows: list[ImageRegions | None]) -> None:
    data, schema = block(rows)
    assert data["region_count"].to_pylist() == [None if row is None else 0 for row in rows]
    for column in ("regions", "rejected_boxes"):
        assert unfolded(data, column).num_rows == 0
    assert unfolded(data, "regions").select(schema.names).schema.types == schema.types
    other, _ = block(ROWS)
    assert pa.concat_tables([data, other]).num_rows == len(rows) + len(ROWS)  # blocks of one pass fit together


def test_filtered_and_joined_blocks_unfold_the_same() -> None:
    """As the sink does: blocks one after the other, pictures that were refused taken out."""
    data, schema = block(ROWS)
    both = pa.concat_tables([data, data.slice(2, 2), data.slice(4)])
    good = both.filter(pc.is_valid(both["region_count"]))
    rows = unfolded(good, "regions").select(schema.names)
    assert rows["region_id"].to_pylist() == ["p0#g0", "p0#g1", "p0#b0", "p3#b1", "p3#b1"]
    one = unfolded(data, "regions").select(schema.names)
    assert rows.take([0, 1, 2, 3]) == one.combine_chunks()
    assert rows.slice(4) == one.slice(3).combine_chunks()
    boxes = unfolded(good, "rejected_boxes")["region_id"].to_pylist()
    assert boxes == ["p3#b0", "p3#b2", "p4#b0", "p3#b0", "p3#b2", "p4#b0"]


def test_what_sorting_gives_is_what_a_picture_takes() -> None:
    found = sort_boxes([[60, 10, 90, 30]], WIDE)
    assert isinstance(found, Boxes)
    row = box_regions(found, np.ones((1, 3), np.float32))
    data, _ = block([row])
    assert unfolded(data, "regions")["box_xyxy"].to_pylist() == [[60, 10, 90, 30]]


# --- written


def finished_block(rows: list[ImageRegions | None]) -> tuple[pa.Table, pa.Schema]:
    """What an encoder hands to the sink, and the schema of its pictures; a null row was refused."""
    counted = pa.field("region_count", pa.int32(), nullable=False)
    schema = tables.arrow_schema("images", {"conv": 1}, extra=[counted])
    data, _ = block(rows)
    good = [row is not None for row in rows]
    columns = {
        "height": pa.array([5 if ok else None for ok in good], pa.int32()),
        "width": pa.array([5 if ok else None for ok in good], pa.int32()),
        "conv": pa.array([[1.0] if ok else None for ok in good], tables.vector_type(1)),
        "stage": pa.array([None if ok else "decode" for ok in good], pa.string()),
        "reason": pa.array([None if ok else "truncated" for ok in good], pa.string()),
        "message": pa.array([None if ok else "m" for ok in good], pa.string()),
    }
    return pa.table({**{name: data[name] for name in data.column_names}, **columns}), schema


def sink_target(home: Path, schema: pa.Schema) -> sink.Target:
    regions = RegionFolders.of(Folder(str(home)), "regions"), tables.arrow_schema("regions", {"conv": 3})
    folders = Folder(f"{home}/images"), Folder(f"{home}/rejects/images")
    return sink.Target(*folders, schema, tables.rejects_schema("image_id", "uri"), "part", 100, 1.0, *regions)


def test_pictures_are_written_after_their_regions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a kill in between leaves regions without pictures, never a picture without its regions."""
    data, schema = finished_block(ROWS)
    target, order = sink_target(tmp_path, schema), []

    def write_shard(folder: Folder, name: str, *rest: Any) -> Any:
        order.append(folder.url.removeprefix(f"{tmp_path}/"))
        return tables.write_shard(folder, name, *rest)

    monkeypatch.setattr(sink, "write_shard", write_shard)
    written = sink._write(target, {"fingerprint": "f"}, "a.parquet", data, data.slice(1, 1))
    assert (written.rows, written.rejects, written.files) == (4, {"truncated": 2}, 1)
    assert all(Path(path).stat().st_size == shard.bytes for path, shard in written.shards.items())
    assert order == ["rejects/images", "regions", "rejects/regions", "images"]
    images = tables.read_shard(target.table, "a.parquet")
    assert images["region_count"].to_pylist() == [3, 0, 1, 0]
    assert images.schema.names == schema.names
    regions = tables.read_shard(target.regions.table, "a.parquet")
    assert regions["region_id"].to_pylist() == ["p0#g0", "p0#g1", "p0#b0", "p3#b1"]
    assert regions.schema.names == ["image_id", "region_id", "box_xyxy", "scale", "clipped", "conv"]
    refused = tables.read_shard(target.regions.rejects, "a.parquet").to_pylist()
    assert {r["stage"] for r in refused} == {"pool"}
    assert [r["uri"] for r in refused] == ["/p3", "/p3", "/p4"]


def test_a_shard_that_is_written_again_leaves_no_old_regions(tmp_path: Path) -> None:
    """A write that is done again overwrites its own file; blocks may be others then, with nothing to put there."""
    data, schema = finished_block(ROWS)
    target = sink_target(tmp_path, schema)
    sink._write(target, {}, "a.parquet", data)
    sink._write(target, {}, "a.parquet", data.slice(1, 2))  # a refused picture, and one without regions
    assert tables.read_shard(target.table, "a.parquet")["image_id"].to_pylist() == ["p2"]
    assert tables.shard_names(target.regions.table) == tables.shard_names(target.regions.rejects) == []
