"""Geometry against open_clip's own transforms: a white mark on a black picture must come out where it says."""

from __future__ import annotations

import re

import numpy as np
import pytest
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from clipray.models.geometry import (
    Geometry,
    boxes_to_cells,
    cells_to_original,
    clip_boxes,
    geometry,
    keep_aspect_size,
    scaled_size,
    scaling_pixels,
    without_area,
)
from clipray.models.pooling import region_grid

PICTURES = [(301, 200), (223, 500), (10, 300), (300, 10), (224, 224), (37, 37), (1000, 333), (65, 97), (225, 224)]
MODES = ("shortest", "longest", "squash")
SIZES: list[int | list[int]] = [224, [64, 64], [64, 96], [97, 64]]


def preprocess(mode: str, size: int | list[int]) -> dict[str, object]:
    """As `ResolvedModel.preprocess`, but without a normalisation."""
    return {"size": size, "resize_mode": mode, "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bicubic"}


def marked(height: int, width: int, cropped: bool) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """A black picture and, as x1, y1, x2, y2, a white rectangle off its centre; a small one where much is cropped."""
    y, x = (min(height, width),) * 2 if cropped else (height, width)
    top, bottom = round(height / 2 - 0.3 * y), round(height / 2 + 0.1 * y)
    left, right = round(width / 2 - 0.2 * x), round(width / 2 + 0.3 * x)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels), (left, top, right, bottom)


def check_light(light: np.ndarray, g: Geometry, box: tuple[int, ...]) -> None:
    """Within a pixel the box of what is half as light as the lightest, and within a tenth the centre of all light."""
    assert light.shape == (g.input_height, g.input_width)
    expected = boxes_to_cells(g, np.array([box]), *light.shape)[0]  # a cell for each pixel
    ys, xs = np.nonzero(light > light.max() / 2)
    np.testing.assert_allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], expected, atol=1, err_msg=str(g))
    centre = [light.sum(axis) @ (np.arange(light.shape[1 - axis]) + 0.5) / light.sum() for axis in (0, 1)]
    np.testing.assert_allclose(centre, (expected[:2] + expected[2:]) / 2, atol=0.1, err_msg=str(g))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_mark_comes_out_where_the_geometry_says(mode: str, size: int | list[int]) -> None:
    settings = preprocess(mode, size)
    transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    for height, width in PICTURES:
        picture, box = marked(height, width, mode == "shortest")
        check_light(transform(picture).numpy()[0].astype(np.float64), geometry(height, width, settings), box)


def coded(height: int, width: int) -> Image.Image:
    """A picture whose red and green say row and column (mod 251) and whose blue is never 0."""
    rows, columns = np.mgrid[:height, :width] % 251
    return Image.fromarray(np.stack([rows, columns, np.full_like(rows, 255)], axis=2).astype(np.uint8))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_resized_size_and_crop_are_exactly_those_of_open_clip(mode: str, size: int | list[int]) -> None:
    settings = preprocess(mode, size)
    resize, crop, *_ = image_transform_v2(PreprocessCfg(**settings), is_train=False).transforms
    rng = np.random.default_rng(3)
    for height, width in [*PICTURES, *rng.integers(20, 160, (40, 2)).tolist(), (213, 142), (142, 213)]:
        g, resized = geometry(height, width, settings), resize(Image.new("RGB", (width, height)))
        assert (g.scale_x * width, g.scale_y * height) == pytest.approx(resized.size, abs=1e-9)
        if mode == "squash":
            assert (g.top, g.left) == (0, 0)
            continue
        pixels = np.asarray(crop(coded(resized.height, resized.width)))
        assert pixels.shape[:2] == (g.input_height, g.input_width)
        ys, xs = np.nonzero(pixels[:, :, 2])
        row, column, _ = pixels[ys[0], xs[0]]
        assert (ys[0], xs[0]) == (max(-g.top, 0), max(-g.left, 0))
        assert (row, column) == (max(g.top, 0) % 251, max(g.left, 0) % 251)


def test_keep_aspect_sizes_worked_out_by_hand() -> None:
    assert keep_aspect_size(300, 200, 224, 16) == (224, 144)  # 14 units; 14 * 2/3 = 9.33 -> 9
    assert keep_aspect_size(200, 300, 224, 16) == (144, 224)
    assert keep_aspect_size(480, 640, 232, 16) == (176, 240)  # 14.5 -> 15 units; 15 * 3/4 = 11.25 -> 11
    assert keep_aspect_size(50, 50, 100, 14) == (98, 98)
    assert keep_aspect_size(1, 3000, 224, 32) == (32, 224)
    assert keep_aspect_size(20, 30, 3, 14) == (14, 14)  # at least one unit each


@pytest.mark.parametrize("picture", PICTURES, ids=str)
def test_keep_aspect_shows_the_whole_picture(picture: tuple[int, int]) -> None:
    g, size = geometry(*picture, {}, (240, 16)), keep_aspect_size(*picture, 240, 16)
    assert (g.input_height, g.input_width, g.top, g.left) == (*size, 0, 0)
    for side, original in zip(size, picture):
        assert side % 16 == 0
        assert abs(side - original * 240 / max(picture)) <= 8 or side == 16
    image, box = marked(*picture, cropped=False)
    check_light(np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))[:, :, 0] / 255, g, box)


def geometries() -> list[Geometry]:
    opened = [geometry(*p, preprocess(mode, size)) for p in PICTURES for mode in MODES for size in SIZES]
    return [*opened, *(geometry(*p, {}, (224, 32)) for p in PICTURES)]


def test_there_and_back_again() -> None:
    grid = region_grid(7, 9, 3)[:, 1:]
    for g in geometries():
        boxes = cells_to_original(g, grid, 7, 9)
        cells = boxes_to_cells(g, boxes, 7, 9)
        assert boxes.dtype == cells.dtype == np.float32
        assert (boxes >= 0).all()
        assert (boxes <= [g.width, g.height] * 2).all()
        if g.input_height <= round(g.scale_y * g.height) and g.input_width <= round(g.scale_x * g.width):
            np.testing.assert_allclose(cells, grid[:, [1, 0, 3, 2]], atol=1e-4)
        else:  # padded: what is left of a region is what lies on the picture
            np.testing.assert_allclose(cells_to_original(g, cells[:, [1, 0, 3, 2]], 7, 9), boxes, rtol=1e-4, atol=1e-3)


def test_cells_worked_out_by_hand() -> None:
    """100 x 200 px to 50 x 50: halved to 50 x 100, of which columns 25 to 75 remain, that is 50 to 150 of the original."""
    g = geometry(100, 200, {"size": 50})
    assert g == Geometry(0.5, 0.5, 0, 25, 100, 200, 50, 50)
    regions = np.array([[0, 0, 5, 5], [1, 2, 3, 5]])
    assert cells_to_original(g, regions, 5, 5).tolist() == [[50, 0, 150, 100], [90, 20, 150, 60]]
    boxes = np.array([[60, 20, 100, 100], [0, 0, 200, 100], [0, 0, 50, 100], [150.5, 10, 200, 20], [149, 99, 150, 100]])
    cells = boxes_to_cells(g, boxes, 5, 5)
    np.testing.assert_allclose(cells[:2], [[0.5, 1, 2.5, 5], [0, 0, 5, 5]])
    assert without_area(cells).tolist() == [False, False, True, True, False]
    padded = geometry(100, 200, {"size": 50, "resize_mode": "longest"})  # 25 x 50, 12 px of padding above
    assert padded == Geometry(0.25, 0.25, -12, 0, 100, 200, 50, 50)
    assert cells_to_original(padded, np.array([[0, 0, 1, 5]]), 5, 5).tolist() == [[0, 0, 200, 0]]
    assert cells_to_original(padded, np.array([[1, 0, 2, 5]]), 5, 5).tolist() == [[0, 0, 200, 32]]


def test_a_pixel_of_a_large_picture_has_area_and_a_touching_box_has_none() -> None:
    g = geometry(9_973, 9_967, preprocess("squash", 224))
    assert not without_area(boxes_to_cells(g, np.array([[5_000, 9_000, 5_001, 9_001]]), 7, 7)).any()
    for g in geometries():  # boxes that end where the input begins, to the last digit
        edge_x, edge_y = g.left / g.scale_x, g.top / g.scale_y
        boxes = np.array([[edge_x - 9, 0, edge_x, g.height], [0, edge_y - 9, g.width, edge_y]])
        assert without_area(boxes_to_cells(g, boxes, 7, 7)).all()


def test_clipping_boxes() -> None:
    nan, inf = np.nan, np.inf
    cases = [  # box, clipped, was clipped, empty
        ([10, 20, 30, 40], [10, 20, 30, 40], False, False),
        ([0, 0, 200, 100], [0, 0, 200, 100], False, False),
        ([-5, 20, 300, 140], [0, 20, 200, 100], True, False),
        ([200, 0, 250, 10], [200, 0, 200, 10], True, True),
        ([30, 20, 10, 40], [30, 20, 10, 40], False, True),
        ([30, 20, 30, 40], [30, 20, 30, 40], False, True),
        ([nan, 0, 10, 10], [0, 0, 0, 0], False, True),
        ([0, 0, inf, 10], [0, 0, 0, 0], False, True),
        ([0, 0, 1e300, 10], [0, 0, 0, 0], False, True),  # no float32
    ]
    clipped, was_clipped, empty = clip_boxes(np.array([case[0] for case in cases]), 100, 200)
    assert clipped.dtype == np.float32
    np.testing.assert_array_equal(clipped, [case[1] for case in cases])
    assert was_clipped.tolist() == [case[2] for case in cases]
    assert empty.tolist() == [case[3] for case in cases]
    assert [part.shape for part in clip_boxes(np.array([]), 100, 200)] == [(0, 4), (0,), (0,)]


G = geometry(10, 10, {"size": 32})
BAD = {
    "height=0, width=5 should be >= 1 px": lambda: geometry(0, 5, {"size": 32}),
    "resize_mode='keep_aspect' is none of shortest, longest, squash": lambda: geometry(
        5, 5, {"size": 32, "resize_mode": "keep_aspect"}
    ),
    "1 x 3000 px would be resized to 0 x 32 px": lambda: geometry(1, 3000, {"size": 32, "resize_mode": "longest"}),
    "long_px=0, multiple=16 should be >= 1 px": lambda: keep_aspect_size(5, 5, 0, 16),
    "grid_cells has shape (1, 5), expected (K, 4)": lambda: cells_to_original(G, region_grid(7, 7, 1), 7, 7),
    "boxes has shape (4,), expected (K, 4)": lambda: clip_boxes(np.arange(4), 10, 10),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        BAD[message]()


def test_pixels_that_scaling_makes_by_hand() -> None:
    assert scaled_size(1, 12_000, preprocess("shortest", 224)) == (224, 2_688_000)
    assert scaling_pixels(1, 12_000, (224, 2_688_000)) == (2_688_000, 224 * 2_688_000)
    assert scaled_size(20_000_000, 1, preprocess("squash", 224)) == (224, 224)
    high = scaling_pixels(20_000_000, 1, (224, 224))  # the width first, at the old height
    assert high == (224 * 20_000_000, 224 * 224)
    assert scaling_pixels(20_000_000, 224, (224, 224)) == (0, 224 * 224)  # it is that wide already
    assert scaling_pixels(600, 800, (224, 298)) == (600 * 298, 224 * 298)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_scaled_size_is_open_clips_own(mode: str, size: int | list[int]) -> None:
    settings = preprocess(mode, size)
    scale = image_transform_v2(PreprocessCfg(**settings), is_train=False).transforms[0]
    for height, width in PICTURES:
        assert scale(Image.new("L", (width, height))).size == scaled_size(height, width, settings)[::-1]
