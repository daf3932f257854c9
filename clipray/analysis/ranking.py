"""Which centroid is nearest to each row of a block, from one matrix product in bf16 or fp32.

A bf16 product takes a quarter of the time of one in fp32, but its scores have 8 bits: ranked by x·c - |c|² / 2, 4 % of
CLIP-like vectors get another of 1,000 centroids. So what is computed is |x - c|² / 2, which is small, and so finely
resolved, where it matters; and where rounding may have put another centroid first (7 % of those vectors, 15 to 20 % with
50 to 300 centroids), their distances are compared exactly. In twelve trials of 16,384 vectors, their mean up to ten times
their spread, all labels were then those of fp32 but one, where fp32 was wrong; it takes a tenth more time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["bf16", "fp32"]
Nearest = Callable[[Tensor, Tensor | None], Tensor]
"""From rows (m, d) of any float type and, unless None, their `bf16_rows` to labels (m,) int64. One thread's: it has buffers."""

LANES = 128  # of the minimum's first step
INF_BITS = 0x7F80  # of bf16
PARTS = 4  # bf16 columns that add up to a float32; three would do, but rows would not be aligned
CLOSE, SLACK = 2**-7, 2**-6  # by how much rounding of the scores, and of the vectors, may lower one: see `_settled`


def native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 itself: AMX, AVX512-BF16, CUDA from 8.0 on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = torch.cpu.get_capabilities()
    return bool(flags.get("amx_bf16") or flags.get("avx512_bf16"))


def ranking(centroids: Tensor, precision: Precision, block: int) -> Callable[[], Nearest]:
    """What makes, for each thread, the function that labels blocks of at most `block` rows.

    Args:
        centroids: (k, d) float32, finite.
    """
    return _ranking_bf16(centroids, block) if precision == "bf16" else _ranking_fp32(centroids, block)


def bf16_rows(x: Tensor) -> Tensor:
    """Rows (m, d) float32 as (m, d + 8) bf16, whose product with those of `_bf16_centroids` is |x - c|² / 2.

    With ^ for rounded to bf16 it is (c·c^ - |c|² / 2) + (x·x^ - |x|² / 2) - x^·c^, the parentheses nearly exact: so what
    rounding does to x and c cancels to first order where x is near c, also for vectors far from the origin.
    """
    half = x.bfloat16()
    return torch.cat([half, half.new_ones(len(x), PARTS), _parts(_offsets(x, half))], dim=1)


def _bf16_centroids(c: Tensor) -> Tensor:
    half = c.bfloat16()
    return -torch.cat([half, _parts(_offsets(c, half)), half.new_ones(len(c), PARTS)], dim=1)


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


def _ranking_bf16(c: Tensor, block: int) -> Callable[[], Nearest]:
    table = _padded(_bf16_centroids(c), c.shape[1])  # (k', d + 8)
    slack = SLACK * c.norm(dim=1).max().item() / math.sqrt(c.shape[1])

    def make() -> Nearest:
        scores = table.new_empty(block, len(table))

        def nearest(x: Tensor, rows: Tensor | None) -> Tensor:
            rows = bf16_rows(x.float()) if rows is None else rows
            return _settled(torch.mm(rows, table.T, out=scores[: len(x)]), x, c, slack)

        return nearest

    return make


def _ranking_fp32(c: Tensor, block: int) -> Callable[[], Nearest]:
    origin = c.mean(0)  # about which less cancels
    c = c - origin
    table = _padded(torch.cat([-c, c.square().sum(1, keepdim=True) / 2], dim=1), c.shape[1])
    points, norms = table[:, :-1].contiguous(), table[:, -1].contiguous()  # (k', d), (k',)

    def make() -> Nearest:
        values, scores = points.new_empty(block, points.shape[1]), points.new_empty(block, len(points))

        def nearest(x: Tensor, _: Tensor | None) -> Tensor:
            shifted = torch.sub(x, origin, out=values[: len(x)])
            return _minima(torch.addmm(norms, shifted, points.T, out=scores[: len(x)]))[1]

        return nearest

    return make


def _padded(table: Tensor, column: int) -> Tensor:
    """With more rows, up to a multiple of LANES unless there are few; inf in `column`, so that they are never nearest."""
    k = len(table)
    if k > 2 * LANES and k % LANES:
        table = torch.nn.functional.pad(table, (0, 0, 0, -k % LANES))
        table[k:, column] = math.inf
    return table


def _minima(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of (m, k) each row's minimum, its column (m,) int64 and the second smallest value.

    If k is a multiple of LANES it takes the minima of every LANES-th column, which vectorises, and then the one within the
    best of these lanes. Those of bf16 are halves of squares, not negative but for rounding: then numbers are ordered as
    their bits are, and integers take a quarter of the time.
    """
    if scores.shape[1] % LANES:
        best, column = scores.min(1)
        return best, column, _without(scores.clone(), column).amin(1)
    keys = scores.view(torch.int16) if scores.dtype == torch.bfloat16 else scores
    lanes = keys.view(len(keys), -1, LANES).amin(1)  # (m, LANES)
    best, lane = lanes.min(1)
    first = torch.arange(0, keys.numel(), LANES, device=keys.device).view(len(keys), -1)  # of each group, in all scores
    within = keys.view(-1).index_select(0, (first + lane[:, None]).view(-1)).view_as(first)  # (m, k / LANES)
    row = within.min(1).indices
    second = torch.minimum(_without(lanes, lane).amin(1), _without(within, row).amin(1))
    return best.view(scores.dtype), row * LANES + lane, second.view(scores.dtype)


def _without(values: Tensor, columns: Tensor) -> Tensor:
    """`values` (m, k), numbers or bits of bf16, with inf written into one column (m,) of each row.

    `scatter_` would copy them all before.
    """
    first = torch.arange(0, values.numel(), values.shape[1], device=values.device)
    values.view(-1).index_fill_(0, first + columns, INF_BITS if values.dtype == torch.int16 else math.inf)
    return values


def _settled(scores: Tensor, x: Tensor, c: Tensor, slack: float) -> Tensor:
    """Columns of the minima of bf16 `scores` (m, k), or of what rounding may have kept from being one and is nearer.

    A score s is off by up to |s| / 256, two together by CLOSE; and, as d values of x and c each are rounded, by typically
    |c| (|s| / d)**0.5 / 512 and nearly three times that at worst: `slack` is eight. Equally near ones give way to the first.
    """
    best, labels, second = _minima(scores)
    most = best.float()
    most += most.abs() * CLOSE + most.abs().sqrt() * slack
    close = (second <= most).nonzero()[:, 0]
    if len(close) == 0:
        return labels
    own = labels[close]  # index_select: an index takes five times as long
    rivals, nearest = _without(scores.index_select(0, close), own), _squared(x, close, c, own)
    while len(close):
        second, other, _ = _minima(rivals)
        still = (second <= most[close]).nonzero()[:, 0]
        close, nearest, other = close[still], nearest[still], other[still]
        rivals = _without(rivals.index_select(0, still), other)
        distances, before = _squared(x, close, c, other), labels[close]
        nearer = (distances < nearest) | ((distances == nearest) & (other < before))
        labels[close], nearest = torch.where(nearer, other, before), torch.minimum(distances, nearest)
    return labels


def _squared(x: Tensor, rows: Tensor, c: Tensor, labels: Tensor) -> Tensor:
    """|x - c|² of some rows of `x` (n, d) and of `c` (k, d), (m,) float32."""
    return x.index_select(0, rows).float().sub_(c.index_select(0, labels)).square_().sum(1)
