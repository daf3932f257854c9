"""Point clouds: what is read from each format, what is refused, what six views show of it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from clipray.analysis.depth_maps import EMPTY, VIEWS, depth_maps, painted, view_weights
from clipray.demo.prompts import SHAPES
from clipray.demo.solids import off, ply, solid_file
from clipray.pipelines.cloud_reader import read_cloud, sample_surface
from clipray.tables.reasons import Rejected

POINTS = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)


def npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def big_endian() -> bytes:
    """A .ply with a colour between the coordinates, and faces behind them."""
    record = np.dtype([("x", ">f8"), ("red", "u1"), ("y", ">f8"), ("z", ">f8")])
    table = np.zeros(len(POINTS), record)
    for n, axis in enumerate("xyz"):
        table[axis] = POINTS[:, n]
    names = "property double x\nproperty uchar red\nproperty double y\nproperty double z\n"
    tail = "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    header = f"ply\nformat binary_big_endian 1.0\nelement vertex {len(POINTS)}\n{names}{tail}"
    return header.encode() + table.tobytes() + b"\x03" + bytes(12)


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (npy(POINTS), 0),
        (npy(np.concatenate([POINTS, POINTS], axis=1)), 0),  # colours behind the coordinates
        (ply(POINTS, text=False), 0),
        (ply(POINTS, text=True), 1e-6),
        (big_endian(), 0),
        (b"OFF 20 0 0\n# no faces\n" + "".join("{} {} {}\n".format(*row) for row in POINTS.tolist()).encode(), 0),
    ],
)
def test_points_are_those_of_the_file(data: bytes, tolerance: float) -> None:
    assert np.abs(read_cloud(data, 100) - POINTS).max() <= tolerance


def test_a_mesh_is_sampled_evenly_over_its_faces() -> None:
    found = read_cloud(off("square", np.random.default_rng(1)), 6_000)
    assert found.shape == (6_000, 3)
    assert np.array_equal(found, read_cloud(off("square", np.random.default_rng(1)), 6_000))  # always the same
    triangles = np.array([[[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 0, 5], [3, 0, 5], [0, 3, 5]]], float)
    points = sample_surface(triangles, 10_000)
    assert (points[:, 2] == 5).mean() == pytest.approx(0.9, abs=0.01)  # nine times the area
    small = points[points[:, 2] == 0]
    assert (small[:, :2].sum(axis=1) <= 1 + 1e-9).all()
    assert small[:, :2].mean(axis=0) == pytest.approx([1 / 3, 1 / 3], abs=0.03)


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        (
            npy(np.where(np.arange(60).reshape(20, 3) == 10, np.nan, POINTS)),
            "not_finite",
            "1 of 20 points .* is point 3",
        ),
        (npy(POINTS[:7]), "too_few_points", "7 points, fewer than 8"),
        (npy(POINTS[:, :2]), "not_a_point_cloud", r"an array of shape \(20, 2\)"),
        (npy(np.array(["a"] * 20)), "not_a_point_cloud", "type <U1"),
        (npy(np.array([{}, []], dtype=object)), "not_a_point_cloud", "expected .npy"),
        (npy(POINTS)[:100], "not_a_point_cloud", "Error"),
        (b"GIF89a", "not_a_point_cloud", "6 bytes starting"),
        (ply(POINTS, text=True)[:-30], "truncated", "19 of the 20 vertices|not_a"),
        (b"ply\nformat ascii 1.0\nelement face 3\nend_header\n", "not_a_point_cloud", "first element is 'face'"),
        (b"OFF\n20 1 0\n1 2 3\n", "truncated", "1 of 20 vertices"),
    ],
)
def test_what_is_refused(data: bytes, reason: str, message: str) -> None:
    with pytest.raises(Rejected, match=message) as caught:
        read_cloud(data, 100)
    assert caught.value.reason == reason
    assert "\n" not in caught.value.message


def test_views_show_the_sides_of_a_cloud() -> None:
    """A long bar, and one point of it that stands out to the right, far and low."""
    bar = np.array([[0, y, z] for y in np.linspace(-1, 1, 41) for z in (-0.05, 0.05)])
    maps = dict(zip(VIEWS, depth_maps(np.concatenate([bar, [[0.5, 1, -0.05]]]), 40, size=0.5, radius=0.0), strict=True))
    assert all(m.shape == (40, 40) for m in maps.values())
    shown = {name: np.argwhere(m != EMPTY) for name, m in maps.items()}
    assert np.ptp(shown["front"], axis=0).tolist() == [1, 5]  # rows: 0.1 of 2, columns: 0.5 of 2, in 20 px
    assert np.ptp(shown["right"], axis=0).tolist() == [1, 20]
    assert np.ptp(shown["top"], axis=0).tolist() == [20, 5]
    column = {name: at[:, 1] for name, at in shown.items()}
    assert column["front"].max() > 20 > column["back"].min()  # to the right from the front, to the left from behind
    assert shown["top"][:, 0].min() < 20  # what is far lies high, seen from above
    assert maps["front"].max() == 1
    front = maps["front"]
    assert front[shown["front"][column["front"].argmax()][0], column["front"].max()] == 0  # the farthest point


def test_the_nearest_point_is_on_top_and_colours_lie_between() -> None:
    cloud = np.array([[0, y, 0] for y in (3.0, -1.0, 1.0)] + [[x, 0, 1.0] for x in (-2, 2)])
    maps = depth_maps(cloud, 20, radius=0.0)
    assert maps[0][11, 10] == 1  # the front looks along y
    assert maps[1][11, 10] == 1
    pictures = painted(maps, np.array([255, 255, 255]), np.array([55, 55, 55]), np.array([9, 8, 7]))
    assert pictures.dtype == np.uint8
    assert pictures[0, 0, 0].tolist() == [9, 8, 7]
    assert pictures[0, 11, 10].tolist() == [255, 255, 255]
    assert sorted(set(pictures[0, :, :, 0].ravel().tolist())) == [9, 205, 255]  # y = 0 is three quarters of the way
    flat = depth_maps(np.zeros((8, 3)), 10)
    assert {EMPTY, 1.0} == set(flat.ravel().tolist())


def test_weights_of_views() -> None:
    maps = np.full((2, 4, 4), EMPTY)
    maps[0, :2], maps[1, 0, :2] = 0.5, 1
    assert view_weights(maps, "area").tolist() == pytest.approx([0.8, 0.2])
    assert view_weights(maps, "equal").tolist() == [0.5, 0.5]


def test_solids_fill_their_shapes() -> None:
    kinds = set()
    for n, shape in enumerate(SHAPES * 3):
        suffix, data = solid_file(shape, n // 8, n)
        kinds.add(suffix)
        front = depth_maps(read_cloud(data, 4_096), 48)[0] != EMPTY
        assert 0.05 < front.mean() < 0.4
        assert front[24, 24] == (shape != "ring") or shape == "crescent"
    assert kinds == {"npy", "ply", "off"}
