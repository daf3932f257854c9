"""Regions as rows: grid regions and given boxes of a picture, in its own pixels, as a nested column beside its vectors.

A block keeps one row a picture until it is written, so a picture and its regions are never apart; the sink unfolds
the nested columns into the regions table and its rejects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipray.models.geometry import (
    Geometry,
    boxes_to_cells,
    cells_to_original,
    clip_boxes,
    without_area,
)


@dataclass(frozen=True)
class Boxes:
    """The given boxes of a picture, sorted out.

    Attributes:
        number: (K,) int, place of each good box in the manifest's list.
        original: (K, 4) float32 xyxy in px of the picture, clipped to it. clipped: (K,) bool, whether that changed it.
        on_input: (K, 4) float32 xyxy in px of the network's input.
        refused: (number, reason, message) of every other box.
    """

    number: np.ndarray
    original: np.ndarray
    clipped: np.ndarray
    on_input: np.ndarray
    refused: list[tuple[int, str, str]]


def sort_boxes(given: Any, picture: Geometry) -> Boxes:
    """Clip the boxes of one manifest row (a list of [x1, y1, x2, y2] in px, or None) and refuse those with nothing in them."""
    raw = list(given or ())
    with np.errstate(over="ignore"):
        rows = np.array([box if _is_box(box) else [np.nan] * 4 for box in raw]).reshape(-1, 4).astype(np.float32)
    original, clipped, empty = clip_boxes(rows, picture.height, picture.width)
    on_input = boxes_to_cells(picture, original, picture.input_height, picture.input_width)
    unseen = without_area(on_input) & ~empty
    refused = [
        (n, "empty_box", f"box {n} {raw[n]}: {_emptiness(rows[n], picture)}") for n in np.flatnonzero(empty).tolist()
    ]
    refused += [
        (n, "outside_crop", f"box {n} {raw[n]}: the network's centre crop of the picture shows nothing of it")
        for n in np.flatnonzero(unseen).tolist()
    ]
    good = np.flatnonzero(~empty & ~unseen)
    return Boxes(good, original[good], clipped[good], on_input[good], refused)


def refuse_boxes(boxes: Boxes, reason: str, messages: Sequence[str | None]) -> Boxes:
    """`boxes` without those that have a message, which are refused with `reason`; one message or None for each box."""
    good = np.array([message is None for message in messages], bool)
    refused = [
        (n, reason, f"box {n}: {message}")
        for n, message in zip(boxes.number.tolist(), messages, strict=True)
        if message is not None
    ]
    return Boxes(
        boxes.number[good], boxes.original[good], boxes.clipped[good], boxes.on_input[good], boxes.refused + refused
    )


def _is_box(box: Any) -> bool:
    return box is not None and len(box) == 4 and all(value is not None for value in box)


def _emptiness(box: np.ndarray, picture: Geometry) -> str:
    if not np.isfinite(box).all():
        return "expected four finite numbers x1, y1, x2, y2 in px"
    if box[2] <= box[0] or box[3] <= box[1]:
        return "expected x1 < x2 and y1 < y2"
    return f"it lies outside the picture of {picture.height} x {picture.width} px (height x width)"


@dataclass(frozen=True)
class PictureRegions:
    """The regions of one picture: names within it, (R, 4) float32 boxes in its px, scales (0 for given boxes), vectors.

    `said`: by column, what the manifest says of each region.
    """

    names: list[str]
    boxes: np.ndarray
    scales: np.ndarray
    clipped: np.ndarray
    vectors: np.ndarray
    refused: list[tuple[int, str, str]] = field(default_factory=list)
    said: dict[str, list[str | None]] = field(default_factory=dict)


def picture_regions(
    picture: Geometry,
    cells: tuple[int, int],
    covered_px: tuple[int, int],
    grid: np.ndarray | None,
    grid_vectors: np.ndarray | None,
    given: Boxes | None,
    box_vectors: np.ndarray | None,
) -> PictureRegions:
    """Put a picture's grid regions (`g0`, `g1`, …) and given boxes (`b0`, …, by their place in the manifest) together.

    Args:
        cells: (height, width) of the map. covered_px: the part of the input that it shows. grid: (R, 5) as `region_grid`. grid_vectors: (R, c). box_vectors: (K, c).
    """
    parts: list[tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    if grid is not None and grid_vectors is not None:
        seen = replace(picture, input_height=covered_px[0], input_width=covered_px[1])
        boxes = cells_to_original(seen, grid[:, 1:], *cells)
        shown = ~without_area(boxes)  # a region of nothing but padding is no part of the picture
        names = [f"g{n}" for n in np.flatnonzero(shown).tolist()]
        parts.append((names, boxes[shown], grid[shown, 0], np.zeros(len(names), bool), grid_vectors[shown]))
    if given is not None and box_vectors is not None:
        names = [f"b{n}" for n in given.number.tolist()]
        parts.append((names, given.original, np.zeros(len(names), np.int32), given.clipped, box_vectors))
    boxes, scales, clipped, vectors = (np.concatenate([part[n] for part in parts]) for n in range(1, 5))
    refused = given.refused if given is not None else []
    return PictureRegions([name for part in parts for name in part[0]], boxes, scales, clipped, vectors, refused)


def region_columns(
    image_ids: Sequence[str], rows: Sequence[PictureRegions | None], schema: pa.Schema
) -> dict[str, pa.Array]:
    """The nested columns of a block: `region_count`, `regions`, `refused_boxes`; one entry a picture, null where refused.

    Args:
        schema: of the regions table, whose `image_id` the picture has already.
    """
    found = [row for row in rows if row is not None]
    own = [f for f in schema if f.name != "image_id"]
    kind = own[4].type  # the vector, behind what all regions have
    vectors = np.concatenate([r.vectors for r in found]) if found else np.zeros((0, kind.list_size))
    boxes = np.concatenate([r.boxes for r in found]) if found else np.zeros((0, 4))
    scales = np.concatenate([r.scales for r in found]) if found else np.zeros(0, np.int32)
    clipped = np.concatenate([r.clipped for r in found]) if found else np.zeros(0, bool)
    ids = [f"{i}#{name}" for i, row in zip(image_ids, rows, strict=True) if row is not None for name in row.names]
    columns = [
        pa.array(ids, pa.string()),
        _vectors(boxes, schema.field("box_xyxy").type),
        pa.array(scales, pa.int32(), mask=scales == 0),
        pa.array(clipped, pa.bool_()),
        _vectors(vectors, kind),
        *(pa.array([said for row in found for said in row.said[f.name]], f.type) for f in own[5:]),
    ]
    struct = pa.StructArray.from_arrays(columns, fields=own)
    counts = [len(row.names) if row is not None else None for row in rows]
    refused = [
        [{"region_id": f"{i}#b{n}", "reason": reason, "message": message} for n, reason, message in row.refused]
        if row is not None
        else None
        for i, row in zip(image_ids, rows, strict=True)
    ]
    return {
        "region_count": pa.array(counts, pa.int32()),
        "regions": pa.ListArray.from_arrays(pa.array(np.cumsum([0, *(c or 0 for c in counts)]), pa.int32()), struct),
        "refused_boxes": pa.array(refused, REFUSED_BOXES),
    }


REFUSED_BOXES = pa.list_(pa.struct([("region_id", pa.string()), ("reason", pa.string()), ("message", pa.string())]))


def _vectors(matrix: np.ndarray, kind: pa.FixedSizeListType) -> pa.Array:
    """(n, d) -> fixed_size_list column of n rows."""
    values = pa.array(np.ascontiguousarray(matrix, kind.value_type.to_pandas_dtype()).ravel(), kind.value_type)
    return pa.FixedSizeListArray.from_arrays(values, type=kind)


def unfolded(data: pa.Table, column: str) -> pa.Table:
    """The entries of a nested column as rows, each with its picture's `image_id` and `uri`."""
    lists = data[column].combine_chunks()
    parents, inner = pc.list_parent_indices(lists), pc.list_flatten(lists)
    own = {name: data[name].take(parents) for name in ("image_id", "uri")}
    return pa.table({**own, **{f.name: inner.field(n) for n, f in enumerate(inner.type)}})
