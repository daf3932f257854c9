"""Where an image's pixels lie in the network's input and in the cells of its feature map, and back.

Coordinates are continuous: pixel i spans [i, i + 1), and so does cell i. Boxes are x1, y1, x2, y2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# A side shorter than this is float32's rounding near 64 cells; one pixel of 10,000 still has 7e-4 of a map's 7 cells.
NO_CELLS = 1e-5


@dataclass(frozen=True)
class Geometry:
    """How one image became the network's input: `input_x = x * scale_x - left`, and likewise down the image.

    Attributes:
        scale_y, scale_x: px of the resized image per px of the original.
        top, left: where the input begins in the resized image, in px; negative where the input is padded.
        height, width: the original, in px.
        input_height, input_width: what the map's cells divide evenly, in px: the whole input. Where patches leave a
            rest of the input unread (384 px in patches of 14), `dataclasses.replace` it by cells x patch.
    """

    scale_y: float
    scale_x: float
    top: int
    left: int
    height: int
    width: int
    input_height: int
    input_width: int


def geometry(
    height: int, width: int, preprocess: Mapping[str, Any], keep_aspect: tuple[int, int] | None = None
) -> Geometry:
    """How an image of this size becomes the network's input: scaled, then cropped or padded around its centre.

    Raises ValueError as `scaled_size`, or for an image without pixels after scaling.
    """
    scaled = scaled_size(height, width, preprocess, keep_aspect)
    if min(scaled) < 1:
        raise ValueError(f"{height} x {width} px would be resized to {scaled[0]} x {scaled[1]} px")
    target = scaled if keep_aspect else pair(preprocess["size"])
    floor = preprocess.get("crop_offset") == "floor"
    top, left = (_offset(side, input_side, floor) for side, input_side in zip(scaled, target))
    return Geometry(scaled[0] / height, scaled[1] / width, top, left, height, width, *target)


def scaled_size(
    height: int, width: int, preprocess: Mapping[str, Any], keep_aspect: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(height, width) in px to which an image is scaled, before it is cropped or padded.

    open_clip's inference transform (`image_transform_v2`, open_clip 3.3) has three modes: `shortest` scales the short
    side to the input and crops the centre, `longest` scales the long side and pads, `squash` scales each side by itself.
    timm's (`center`, `border`, `squash`) are the same, but for the size to which they scale: `scale_to`.

    Args:
        height, width: of the image, in px.
        preprocess: open_clip's `PreprocessCfg` as a dict, of which `size` and `resize_mode` count, or `scale_to`.
        keep_aspect: the arguments of `keep_aspect_size`, which then counts instead.

    Raises:
        ValueError: an image without pixels, or an unknown `resize_mode`.
    """
    if keep_aspect:
        return keep_aspect_size(height, width, *keep_aspect)
    target, mode = scale_target(preprocess), preprocess.get("resize_mode") or "shortest"
    _check_image(height, width)
    if mode == "squash":
        return target
    if mode == "shortest" and target[0] == target[1]:
        return _resize(height, width, target[0])
    if mode in ("shortest", "longest"):
        return _resize_keep_ratio(height, width, target, mode)
    raise ValueError(f"resize_mode={mode!r} is none of shortest, longest, squash")


def scale_target(preprocess: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) in px to which a side, or both, are scaled: `scale_to` where it is not the network's `size`."""
    return pair(preprocess.get("scale_to") or preprocess["size"])


def squashed(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """The same preprocessing of the whole image: its sides are scaled separately, and nothing is cropped."""
    kept = {key: value for key, value in preprocess.items() if key != "scale_to"}
    return {**kept, "resize_mode": "squash"}


def scaling_pixels(height: int, width: int, scaled: tuple[int, int]) -> tuple[int, int]:
    """Pixels of the images that Pillow makes to scale `height` x `width` px to `scaled` (height, width).

    It scales the width first: the image in between has the new width and the old height. The other one is the result.
    """
    return height * scaled[1] if width != scaled[1] else 0, scaled[0] * scaled[1]


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of open_clip's `size`, which is one number for a square."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def keep_aspect_size(height: int, width: int, long_px: int, multiple: int) -> tuple[int, int]:
    """(height, width) in px of an input that keeps the image's aspect: nothing cropped, sides multiples of `multiple`.

    The long side is `long_px`, the short side follows it; both go to the nearest multiple (halves up), at least one.

    Raises:
        ValueError: an argument below 1.
    """
    _check_image(height, width)
    if min(long_px, multiple) < 1:
        raise ValueError(f"long_px={long_px}, multiple={multiple} should be >= 1 px")
    short, long = min(height, width), max(height, width)
    long_units = max((2 * long_px + multiple) // (2 * multiple), 1)
    short_units = max((2 * long_units * short + long) // (2 * long), 1)
    units = (long_units, short_units) if height >= width else (short_units, long_units)
    return units[0] * multiple, units[1] * multiple


def _check_image(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise ValueError(f"height={height}, width={width} should be >= 1 px")


def _resize(height: int, width: int, short_px: int) -> tuple[int, int]:
    """torchvision's `Resize` to a short side: the long side is rounded down."""
    if width <= height:
        return int(short_px * height / width), short_px
    return short_px, int(short_px * width / height)


def _resize_keep_ratio(height: int, width: int, target: tuple[int, int], mode: str) -> tuple[int, int]:
    """open_clip's `ResizeKeepRatio`: both sides are rounded, halves to even."""
    ratios = height / target[0], width / target[1]
    ratio = max(ratios) if mode == "longest" else min(ratios)
    return round(height / ratio), round(width / ratio)


def _offset(side: int, input_side: int, floor: bool) -> int:
    """Of `CenterCrop` and `CenterCropOrPad`: half of what is padded, rounded down, or cropped, rounded to even.

    floor: of transformers, where the crop begins at the pixel before the half, also where that is outside the image.
    """
    if floor:
        return (side - input_side) // 2
    return round((side - input_side) / 2) if side >= input_side else -((input_side - side) // 2)


def cells_to_original(geometry: Geometry, grid_cells: np.ndarray, map_height: int, map_width: int) -> np.ndarray:
    """Regions of the map as boxes of the image.

    Args:
        grid_cells: (R, 4) top, left, bottom, right in cells, half-open, as `region_grid` without its scale.
        map_height, map_width: of the map, in cells.

    Returns:
        (R, 4) float32 x1, y1, x2, y2 in px of the original, clipped to it; without area where all is padding.

    Raises:
        ValueError: `grid_cells` of another shape.
    """
    boxes = _four_columns(grid_cells, "grid_cells")[:, [1, 0, 3, 2]]  # (R, 4) xyxy, in cells
    cell = np.tile([geometry.input_width / map_width, geometry.input_height / map_height], 2)
    pixels = (boxes * cell + _origin(geometry)) / _scale(geometry)
    return pixels.clip(0, [geometry.width, geometry.height] * 2).astype(np.float32)


def boxes_to_cells(geometry: Geometry, boxes_xyxy: np.ndarray, map_height: int, map_width: int) -> np.ndarray:
    """Boxes of the image (K, 4) xyxy in px of the original -> (K, 4) float32 xyxy in cells, clipped to the map.

    A box that the input does not show has no area then (`without_area`). Raises ValueError for another shape.
    """
    pixels = _four_columns(boxes_xyxy, "boxes") * _scale(geometry) - _origin(geometry)
    cells = pixels * np.tile([map_width / geometry.input_width, map_height / geometry.input_height], 2)
    return cells.clip(0, [map_width, map_height] * 2).astype(np.float32)


def without_area(cells_xyxy: np.ndarray) -> np.ndarray:
    """(K,) bool: which boxes in cells, as from `boxes_to_cells`, lie outside what the network sees, or are NaN."""
    sides = cells_xyxy[:, 2:] - cells_xyxy[:, :2]
    return ~(sides > NO_CELLS).all(axis=1)


def clip_boxes(boxes: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (K, 4) x1, y1, x2, y2 in px cut to an image of `height`, `width` px.

    Returns:
        clipped (K, 4) float32, zeros where a coordinate is NaN or infinite;
        was_clipped (K,) bool, a finite box changed;
        empty (K,) bool, not finite, turned around or outside the image: nothing of it can be pooled.

    Raises:
        ValueError: `boxes` of another shape.
    """
    with np.errstate(over="ignore"):
        corners = _four_columns(boxes, "boxes").astype(np.float32)
    finite = np.isfinite(corners).all(axis=1)
    corners[~finite] = 0
    clipped = corners.clip(0, np.array([width, height] * 2, np.float32))
    return clipped, np.any(clipped != corners, axis=1), np.any(clipped[:, 2:] <= clipped[:, :2], axis=1)


def _four_columns(values: np.ndarray, name: str) -> np.ndarray:
    """(K, 4) float64; an empty list, as tables hold it, has no rows."""
    array = np.asarray(values, dtype=np.float64)
    if array.shape == (0,):
        return array.reshape(0, 4)
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"{name} has shape {array.shape}, expected (K, 4)")
    return array


def _scale(geometry: Geometry) -> np.ndarray:
    return np.tile([geometry.scale_x, geometry.scale_y], 2)


def _origin(geometry: Geometry) -> np.ndarray:
    return np.tile([geometry.left, geometry.top], 2).astype(np.float64)
