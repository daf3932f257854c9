"""From a feature map to vectors: MAC, SPoC, GeM, the R-MAC region grid, regions and boxes.

A map `x` is (b, channels, height, width) of any float type on any device; vectors are float32 on the same device. Maps
that lie channels-last in memory (a vision transformer's tokens seen as a map) are pooled without a copy of the map.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

from clipray.analysis.normalize import l2_normalize_tensor

BINS = 14  # along each side of a box; a point in the middle of each is looked at
BOX_BYTES = 64 * 2**20  # of boxes cut out at a time
Pooling = Literal["mac", "spoc", "gem"]


def region_grid(height: int, width: int, levels: int, overlap: float = 0.4) -> np.ndarray:
    """Square regions of a map at several scales (Tolias, Sicre, Jégou 2015, arXiv 1511.05879).

    With w the shorter side, scale l = 1 … `levels` has regions of side floor(2w / (l + 1)): l of them along the shorter
    side, l + m - 1 along the longer, evenly spaced from edge to edge and rounded down. A square map has m = 1. Otherwise
    m >= 2 is the count of regions at scale 1 whose neighbours overlap by nearest to `overlap` of their side (of two the
    smaller), at most the number of distinct positions. A scale without a whole cell is left out, and so is a region that
    repeats another of its scale, as happens on maps of a few cells.

    Args:
        height, width: of the map in cells.
        levels: the largest scale, at least 1.
        overlap: in [0, 1), taken as the decimal that it was written as.

    Returns:
        (R, 5) int32 `scale, top, left, bottom, right` in cells, half-open, sorted; R >= 1.

    Raises:
        ValueError: a size or `levels` below 1, or `overlap` outside [0, 1).
    """
    if min(height, width) < 1:
        raise ValueError(f"height={height}, width={width} should be >= 1 cell")
    if levels < 1:
        raise ValueError(f"levels={levels} should be >= 1")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap={overlap} should be in [0, 1)")
    short, m = min(height, width), _regions_along(min(height, width), max(height, width), overlap)
    rows: list[tuple[int, int, int, int, int]] = []
    for scale in range(1, levels + 1):
        side = 2 * short // (scale + 1)
        if side == 0:
            break
        tops, lefts = (_starts(extent, side, scale + (m - 1) * (extent > short)) for extent in (height, width))
        rows += [(scale, top, left, top + side, left + side) for top in tops for left in lefts]
    return np.array(rows, dtype=np.int32)


def _regions_along(short: int, long: int, overlap: float) -> int:
    """`m`: regions of side `short` along `long`; exact, so that 0.4 is two fifths where two counts are equally near."""
    if long == short:
        return 1
    wanted = Fraction(overlap).limit_denominator(10**6)
    return min(range(2, long - short + 2), key=lambda m: abs(1 - Fraction(long - short, (m - 1) * short) - wanted))


def _starts(extent: int, side: int, count: int) -> list[int]:
    """Distinct positions of `count` regions along one axis."""
    return sorted({i * (extent - side) // max(count - 1, 1) for i in range(count)})


def pool_map(x: Tensor, pooling: Pooling = "mac", p: float = 3.0, eps: float = 1e-6) -> Tensor:
    """The whole map (b, c, h, w) -> (b, c): its maximum (`mac`), mean (`spoc`) or power mean (`gem`, arXiv 1711.02512).

    GeM takes values below `eps` as `eps`; `p = 1` is SPoC and `p = inf` is MAC on maps >= `eps`. Powers are relative to
    the maximum, so that none overflows.

    Raises:
        ValueError: another `pooling`, `p` or `eps` not above 0, or `x` without four axes.
    """
    return _pooled(_map(x).flatten(2), 2, pooling, p, eps)


def pool_regions(x: Tensor, grid: np.ndarray, pooling: Pooling = "mac", p: float = 3.0) -> Tensor:
    """Raw vectors of a grid's regions, not normalised.

    Args:
        x: (b, c, height, width).
        grid: (R, 5) as from `region_grid` of the same height and width.
        pooling: what is taken over each region's cells; `p` is GeM's.

    Returns:
        (b, R, c) float32.

    Raises:
        ValueError: another `pooling`, a region without cells or beyond the map, or `x` without four axes.
    """
    cells = _map(x).permute(0, 2, 3, 1).contiguous()  # (b, h, w, c): several times faster to slice and reduce
    tops, lefts, bottoms, rights = grid[:, 1:].T
    if not ((tops >= 0) & (lefts >= 0) & (tops < bottoms) & (lefts < rights)).all():
        raise ValueError("the grid has a region without cells or with negative ones")
    if (bottoms > cells.shape[1]).any() or (rights > cells.shape[2]).any():
        raise ValueError(
            f"the grid reaches {bottoms.max()} x {rights.max()} cells, the map has {cells.shape[1]} x {cells.shape[2]}"
        )
    vectors = cells.new_empty(len(cells), len(grid), cells.shape[3])
    for i, (_, top, left, bottom, right) in enumerate(grid.tolist()):
        vectors[:, i] = _pooled(cells[:, top:bottom, left:right].flatten(1, 2), 1, pooling, p)
    return vectors


def rmac_from_regions(region_vectors: Tensor) -> Tensor:
    """Sum of the L2-normalised region vectors (b, R, c) -> (b, c) float32. The sum itself is not normalised."""
    return l2_normalize_tensor(region_vectors).sum(1)


def pool_boxes(x: Tensor, boxes: Tensor, image_index: Tensor, pooling: Pooling = "mac", p: float = 3.0) -> Tensor:
    """Raw vectors of boxes that need not lie on cell edges: RoIAlign, then a pooling over its bins.

    It interpolates between the centres of cells (arXiv 1703.06870), so a box of whole cells is pooled nearly as
    `pool_regions` does: with the default grid cosine above 0.99 on maps of up to 14 cells a side.

    Args:
        x: (b, c, height, width).
        boxes: (K, 4) x1, y1, x2, y2 in cells of the map, finite; a cell spans [i, i + 1).
        image_index: (K,) int64, each box's row of `x`.
        pooling: what is taken over the bins; `p` is GeM's.

    Returns:
        (K, c) float32; (0, c) without boxes.

    Raises:
        ValueError: another `pooling`, wrong shapes, a box that is not finite or an index outside the batch.
    """
    x = _map(x)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or image_index.shape != boxes.shape[:1]:
        shapes = tuple(boxes.shape), tuple(image_index.shape)
        raise ValueError(f"boxes {shapes[0]} and image_index {shapes[1]} should be (K, 4) and (K,)")
    # RoIAlign checks neither of these, and would read beyond the map.
    if not bool(((image_index >= 0) & (image_index < len(x))).all()):
        raise ValueError(f"image_index should be in [0, {len(x)})")
    if not bool(boxes.isfinite().all()):
        raise ValueError("boxes should be finite")
    rois = torch.cat([image_index[:, None].to(x), boxes.to(x)], dim=1)  # (K, 5)
    vectors = x.new_empty(len(rois), x.shape[1])
    for rows in torch.arange(len(rois), device=x.device).split(max(1, BOX_BYTES // (4 * x.shape[1] * BINS**2))):
        binned = roi_align(x, rois[rows], BINS, sampling_ratio=1, aligned=True)  # (k, c, BINS, BINS)
        vectors[rows] = _pooled(binned.flatten(2), 2, pooling, p)
    return vectors


def _map(x: Tensor) -> Tensor:
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (b, channels, height, width)")
    return x.float()


def _pooled(cells: Tensor, dim: int, pooling: Pooling, p: float = 3.0, eps: float = 1e-6) -> Tensor:
    """`cells` without its axis `dim`."""
    if pooling == "mac":
        return cells.amax(dim)
    if pooling == "spoc":
        return cells.mean(dim)
    if pooling != "gem":
        raise ValueError(f"pooling={pooling!r} is none of {', '.join(get_args(Pooling))}")
    if not (p > 0 and eps > 0):
        raise ValueError(f"p={p}, eps={eps} should be > 0")
    cells = cells.clamp(min=eps)
    top = cells.amax(dim, keepdim=True)
    return (cells / top).pow(p).mean(dim).pow(1 / p) * top.squeeze(dim)
