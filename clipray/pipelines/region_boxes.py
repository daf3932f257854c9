"""Grid regions and manifest boxes of an image, in its own pixels, as a nested column beside its vectors.

A block has one row per image until it is written, so an image and its regions stay together. The sink unfolds the
nested columns into the regions table and its rejects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipray.models.geometry import Geometry, boxes_to_cells, cells_to_original, clip_boxes, without_area
from clipray.tables import vector_array

RawBoxes = Sequence[Sequence[float | None] | None] | None
"""The boxes of one manifest row, each x1, y1, x2, y2 in px; a bad one may be anything else."""


@dataclass(frozen=True)
class Boxes:
    """The boxes of an image, clipped, without the rejected.

    Attributes:
        number: (K,) int, place of each good box in the manifest's list.
        original: (K, 4) float32 xyxy in px of the image, clipped to it. clipped: (K,) bool, whether that changed it.
        on_input: (K, 4) float32 xyxy in px of the network's input.
        rejected: (number, reason, message) of every other box.
    """

    number: np.ndarray
    original: np.ndarray
    clipped: np.ndarray
    on_input: np.ndarray
    rejected: list[tuple[int, str, str]]

    def only(self, good: np.ndarray, rejected: list[tuple[int, str, str]]) -> Boxes:
        """Those where `good` (K,) bool is true; `rejected`: the others."""
        numbers, others = self.number[good], self.rejected + rejected
        return Boxes(numbers, self.original[good], self.clipped[good], self.on_input[good], others)


def sort_boxes(raw: RawBoxes, image: Geometry) -> Boxes:
    """Clip the boxes of one manifest row (a list of [x1, y1, x2, y2] in px, or None) and reject those with nothing in them."""
    raw = list(raw or ())
    with np.errstate(over="ignore"):
        rows = np.array([box if _is_box(box) else [np.nan] * 4 for box in raw]).reshape(-1, 4).astype(np.float32)
    original, clipped, empty = clip_boxes(rows, image.height, image.width)
    on_input = boxes_to_cells(image, original, image.input_height, image.input_width)
    unseen = without_area(on_input) & ~empty
    rejected = [
        (n, "empty_box", f"box {n} {raw[n]}: {_emptiness(rows[n], image)}") for n in np.flatnonzero(empty).tolist()
    ]
    rejected += [
        (n, "outside_crop", f"box {n} {raw[n]}: the network's centre crop of the image shows nothing of it")
        for n in np.flatnonzero(unseen).tolist()
    ]
    return Boxes(np.arange(len(raw)), original, clipped, on_input, []).only(~empty & ~unseen, rejected)


def reject_boxes(boxes: Boxes, reason: str, messages: Sequence[str | None]) -> Boxes:
    """`boxes` without those that have a message, which are rejected with `reason`; one message or None for each box."""
    good = np.array([message is None for message in messages], bool)
    rejected = [
        (n, reason, f"box {n}: {message}")
        for n, message in zip(boxes.number.tolist(), messages, strict=True)
        if message is not None
    ]
    return boxes.only(good, rejected)


def _is_box(box: Any) -> bool:
    return box is not None and len(box) == 4 and all(value is not None for value in box)


def _emptiness(box: np.ndarray, image: Geometry) -> str:
    if not np.isfinite(box).all():
        return "expected four finite numbers x1, y1, x2, y2 in px"
    if box[2] <= box[0] or box[3] <= box[1]:
        return "expected x1 < x2 and y1 < y2"
    return f"it lies outside the image of {image.height} x {image.width} px (height x width)"


@dataclass(frozen=True)
class ImageRegions:
    """The regions of one image: names within it, (R, 4) float32 boxes in its px, scales (0 for boxes), vectors.

    `columns`: by column, what the manifest has for each region.
    """

    names: list[str]
    boxes: np.ndarray
    scales: np.ndarray
    clipped: np.ndarray
    vectors: np.ndarray
    rejected: list[tuple[int, str, str]] = field(default_factory=list)
    columns: Mapping[str, list[str | None]] = field(default_factory=dict)


def grid_regions(
    image: Geometry, cells: tuple[int, int], covered_px: tuple[int, int], grid: np.ndarray, vectors: np.ndarray
) -> ImageRegions:
    """The grid regions of an image, `g0`, `g1`, …, without those that show nothing but padding.

    Args:
        cells: (height, width) of the map. covered_px: the part of the input that it shows.
        grid: (R, 5) as `region_grid`. vectors: (R, c).
    """
    seen = replace(image, input_height=covered_px[0], input_width=covered_px[1])
    boxes = cells_to_original(seen, grid[:, 1:], *cells)
    shown = ~without_area(boxes)
    names = [f"g{n}" for n in np.flatnonzero(shown).tolist()]
    return ImageRegions(names, boxes[shown], grid[shown, 0], np.zeros(len(names), bool), vectors[shown])


def box_regions(
    boxes: Boxes, vectors: np.ndarray, columns: Mapping[str, list[str | None]] | None = None
) -> ImageRegions:
    """The boxes of an image, `b0`, `b1`, …, by their place in the manifest. vectors: (K, c)."""
    names, scales = [f"b{n}" for n in boxes.number.tolist()], np.zeros(len(boxes.number), np.int32)
    return ImageRegions(names, boxes.original, scales, boxes.clipped, vectors, boxes.rejected, columns or {})


def joined(parts: Sequence[ImageRegions]) -> ImageRegions:
    """The regions of one image from its grid and its boxes, without further columns."""
    names = [name for part in parts for name in part.names]
    boxes, scales = np.concatenate([p.boxes for p in parts]), np.concatenate([p.scales for p in parts])
    clipped, vectors = np.concatenate([p.clipped for p in parts]), np.concatenate([p.vectors for p in parts])
    return ImageRegions(names, boxes, scales, clipped, vectors, [box for part in parts for box in part.rejected])


def _no_regions(width: int) -> ImageRegions:
    boxes, vectors = np.zeros((0, 4), np.float32), np.zeros((0, width), np.float32)
    return ImageRegions([], boxes, np.zeros(0, np.int32), np.zeros(0, bool), vectors)


def region_vector_field(schema: pa.Schema) -> pa.Field:
    """The vector of the regions table, behind what all regions have."""
    return schema.field(5)


def region_columns(
    image_ids: Sequence[str], rows: Sequence[ImageRegions | None], schema: pa.Schema
) -> dict[str, pa.Array]:
    """The nested columns of a block: `region_count`, `regions`, `rejected_boxes`; one entry per image, null where rejected.

    Args:
        schema: of the regions table, whose `image_id` the image has already.
    """
    good = [row for row in rows if row is not None]
    fields = [f for f in schema if f.name != "image_id"]
    vector_type = region_vector_field(schema).type
    regions = joined([_no_regions(vector_type.list_size), *good])
    ids = [f"{i}#{name}" for i, row in zip(image_ids, rows, strict=True) if row is not None for name in row.names]
    columns = [
        pa.array(ids, pa.string()),
        vector_array(regions.boxes, schema.field("box_xyxy").type),
        pa.array(regions.scales, pa.int32(), mask=regions.scales == 0),
        pa.array(regions.clipped, pa.bool_()),
        vector_array(regions.vectors, vector_type),
        *(pa.array([value for row in good for value in row.columns[f.name]], f.type) for f in fields[5:]),
    ]
    struct = pa.StructArray.from_arrays(columns, fields=fields)
    counts = [len(row.names) if row is not None else None for row in rows]
    rejected = [
        [{"region_id": f"{i}#b{n}", "reason": reason, "message": message} for n, reason, message in row.rejected]
        if row is not None
        else None
        for i, row in zip(image_ids, rows, strict=True)
    ]
    return {
        "region_count": pa.array(counts, pa.int32()),
        "regions": pa.ListArray.from_arrays(pa.array(np.cumsum([0, *(c or 0 for c in counts)]), pa.int32()), struct),
        "rejected_boxes": pa.array(rejected, REJECTED_BOXES),
    }


REJECTED_BOXES = pa.list_(pa.struct([("region_id", pa.string()), ("reason", pa.string()), ("message", pa.string())]))


def unfolded(data: pa.Table, column: str) -> pa.Table:
    """The entries of a nested column as rows, each with its image's `image_id` and `uri`."""
    lists = data[column].combine_chunks()
    parents, inner = pc.list_parent_indices(lists), pc.list_flatten(lists)
    of_image = {name: data[name].take(parents) for name in ("image_id", "uri")}
    return pa.table({**of_image, **{f.name: inner.field(n) for n, f in enumerate(inner.type)}})
