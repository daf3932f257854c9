"""Depth maps of a point cloud from six sides: orthographic, deterministic, the nearest point on top."""

from __future__ import annotations

import numpy as np

# Where each view's right, up and towards the viewer lie: axis and sign. z is up, but from above and below, where y is.
VIEWS: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "front": ((0, 1), (2, 1), (1, -1)),
    "back": ((0, -1), (2, 1), (1, 1)),
    "right": ((1, 1), (2, 1), (0, 1)),
    "left": ((1, -1), (2, 1), (0, -1)),
    "top": ((0, 1), (1, 1), (2, 1)),
    "bottom": ((0, 1), (1, -1), (2, -1)),
}
EMPTY = -1.0


def depth_maps(points: np.ndarray, side_px: int, size: float = 0.5, radius: float = 0.03) -> np.ndarray:
    """Six maps of a cloud, centred and scaled by its box, in the order of `VIEWS`.

    Args:
        points: (n, 3), finite. size: of the cloud's longest side, as a share of the map's. radius: of the disc that a
            point covers, likewise.

    Returns:
        (6, side_px, side_px) float32: 1 the side of the cloud's box that is nearest to the viewer, 0 the farthest, EMPTY
        where no point is. A cloud without depth is 1.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    longest = float((high - low).max())
    centred = (points - (low + high) / 2) * (size / longest if longest > 0 else 0.0)  # (n, 3) in -size/2 … size/2
    disc = _disc(radius * side_px)
    return np.stack([_map(centred, view, side_px, disc) for view in VIEWS.values()])


def _map(points: np.ndarray, view: tuple[tuple[int, int], ...], side_px: int, disc: np.ndarray) -> np.ndarray:
    right, up, near = (points[:, axis] * sign for axis, sign in view)
    x = np.floor((0.5 + right) * side_px).astype(np.int64)
    y = np.floor((0.5 - up) * side_px).astype(np.int64)
    deep = float(near.max() - near.min())
    depth = ((near - near.min()) / deep if deep > 0 else np.ones_like(near)).astype(np.float32)
    rows, columns = (y[:, None] + disc[:, 0]).ravel(), (x[:, None] + disc[:, 1]).ravel()
    inside = (rows >= 0) & (rows < side_px) & (columns >= 0) & (columns < side_px)
    depths = np.full(side_px * side_px, EMPTY, np.float32)
    np.maximum.at(depths, (rows * side_px + columns)[inside], np.repeat(depth, len(disc))[inside])
    return depths.reshape(side_px, side_px)


def _disc(radius_px: float) -> np.ndarray:
    """(m, 2) offsets in px of the pixels of a disc, its middle included."""
    reach = int(radius_px)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return np.argwhere(y**2 + x**2 <= max(radius_px, 0.5) ** 2) - reach


def painted(maps: np.ndarray, near: np.ndarray, far: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Maps (v, h, w) as images (v, h, w, 3) uint8; the colours are (3,) in 0 … 255, depth lies between two of them."""
    depth = maps[..., None].clip(0, 1)
    colour = np.where(maps[..., None] == EMPTY, ground, far + depth * (near.astype(np.float64) - far))
    return colour.round().astype(np.uint8)


def view_weights(maps: np.ndarray, how: str) -> np.ndarray:
    """(v,) float32 that add up to 1: `area`, as the maps' foregrounds; `equal`."""
    area = (maps != EMPTY).mean(axis=(1, 2)) if how == "area" else np.ones(len(maps))
    result: np.ndarray = (area / area.sum()).astype(np.float32)
    return result
