"""Which centroid is nearest to each row of a block, from one matrix product in bf16 or fp32.

A bf16 product takes a quarter of the time of one in fp32, but its scores have 8 bits. So what is computed is the score
-|x - c|² / 2 itself, which is small, and so finely resolved, where it matters, and the best two centroids of a row are
compared exactly where rounding may have swapped them. On CLIP-like vectors and 1,000 centroids 0.02 to 0.1 % of the rows
then get another centroid than in fp32, one that is nearly as near: 1e-6 to 3e-6 of the inertia. Without the comparison
it would be 1 to 2 % of the rows, and from bf16 scores x·c - |c|² / 2 up to 4 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["bf16", "fp32"]
Nearest = Callable[[Tensor, Tensor | None], Tensor]
"""From rows (m, d) of any float type and, unless None, their `bf16_rows` to labels (m,) int64."""

LANES = 128  # of the maximum's first step
PARTS = 4  # bf16 columns that add up to a float32; three would do, but rows would not be aligned
CLOSE = 2**-7  # two bf16 scores nearer than this, relatively, may have been swapped by rounding


def native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 itself: AMX, AVX512-BF16, CUDA from 8.0 on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = torch.cpu.get_capabilities()
    return bool(flags.get("amx_bf16") or flags.get("avx512_bf16"))


def ranking(centroids: Tensor, precision: Precision, block: int) -> Nearest:
    """The function that labels blocks of at most `block` rows; it writes the same buffers again and again.

    Args:
        centroids: (k, d) float32, finite.
    """
    return _ranking_bf16(centroids, block) if precision == "bf16" else _ranking_fp32(centroids, block)


def bf16_rows(x: Tensor) -> Tensor:
    """Rows (m, d) float32 as (m, d + 8) bf16, whose product with those of `_bf16_centroids` is -|x - c|² / 2.

    With ^ for rounded to bf16 it is x^·c^ - (c·c^ - |c|² / 2) - (x·x^ - |x|² / 2), the parentheses nearly exact: so what
    rounding does to x and c cancels to first order where x is near c, also for vectors far from the origin.
    """
    half = x.bfloat16()
    return torch.cat([half, half.new_ones(len(x), PARTS), _parts(_offsets(x, half))], dim=1)


def _bf16_centroids(c: Tensor) -> Tensor:
    half = c.bfloat16()
    return torch.cat([half, _parts(_offsets(c, half)), half.new_ones(len(c), PARTS)], dim=1)


def _offsets(x: Tensor, half: Tensor) -> Tensor:
    """|x|² / 2 - x·x^, (m,) float32."""
    return x.square().sum(1).div_(2).sub_((x * half).sum(1))


def _parts(values: Tensor) -> Tensor:
    """(m,) float32 -> (m, PARTS) bf16 that add up to it."""
    columns = []
    for _ in range(PARTS):
        columns.append(values.bfloat16())
        values = values - columns[-1].float()
    return torch.stack(columns, dim=1)


def _ranking_bf16(c: Tensor, block: int) -> Nearest:
    table = _padded(_bf16_centroids(c), c.shape[1])  # (k', d + 8)
    scores = table.new_empty(block, len(table))

    def nearest(x: Tensor, rows: Tensor | None) -> Tensor:
        rows = bf16_rows(x.float()) if rows is None else rows
        return _settled(torch.mm(rows, table.T, out=scores[: len(x)]), x, c)

    return nearest


def _ranking_fp32(c: Tensor, block: int) -> Nearest:
    origin = c.mean(0)  # about which less cancels
    c = c - origin
    table = _padded(torch.cat([c, c.square().sum(1, keepdim=True) / -2], dim=1), c.shape[1])
    points, norms = table[:, :-1].contiguous(), table[:, -1].contiguous()  # (k', d), (k',)
    values, scores = points.new_empty(block, points.shape[1]), points.new_empty(block, len(points))

    def nearest(x: Tensor, _: Tensor | None) -> Tensor:
        shifted = torch.sub(x, origin, out=values[: len(x)])
        return _argmax(torch.addmm(norms, shifted, points.T, out=scores[: len(x)]))

    return nearest


def _padded(table: Tensor, column: int) -> Tensor:
    """With more rows, up to a multiple of LANES unless there are few; -inf in `column`, so that they are never nearest."""
    k = len(table)
    if k > 2 * LANES and k % LANES:
        table = torch.nn.functional.pad(table, (0, 0, 0, -k % LANES))
        table[k:, column] = -math.inf
    return table


def _argmax(scores: Tensor) -> Tensor:
    """Columns of the maxima (m, k) -> (m,) int64."""
    return _columns(scores, _lanes(scores).max(1).indices)


def _settled(scores: Tensor, x: Tensor, c: Tensor) -> Tensor:
    """As `_argmax` of bf16 `scores`, which it may overwrite; of two close ones the nearer, if equally near the first."""
    lanes = _lanes(scores)
    best, lane = lanes.max(1)
    labels = _columns(scores, lane)
    second, other_lane = lanes.scatter_(1, lane[:, None], -math.inf).max(1)
    close = (best.float() - second.float() <= second.float().abs() * CLOSE).nonzero()[:, 0]
    if len(close):
        x, first, other = x[close], labels[close], _columns(scores[close], other_lane[close])
        nearer = (x - c[other]).square_().sum(1) - (x - c[first]).square_().sum(1)
        labels[close] = torch.where((nearer < 0) | ((nearer == 0) & (other < first)), other, first)
    return labels


def _lanes(scores: Tensor) -> Tensor:
    """Maxima (m, k) -> (m, LANES) of every LANES-th column; few scores, not padded, are returned as they are.

    With the second step in `_columns` it takes half the time of `scores.max(1)`, which does not vectorise.
    """
    return scores if scores.shape[1] % LANES else scores.view(len(scores), -1, LANES).amax(1)


def _columns(scores: Tensor, lane: Tensor) -> Tensor:
    """The column of the maximum within each row's `lane`, (m,) int64."""
    if scores.shape[1] % LANES:
        return lane
    groups = scores.view(len(scores), -1, LANES)
    column = groups.gather(2, lane[:, None, None].expand(-1, groups.shape[1], 1)).squeeze(2)  # (m, k / LANES)
    return column.max(1).indices * LANES + lane
