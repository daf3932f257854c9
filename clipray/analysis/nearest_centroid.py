"""Which centroid is nearest to each row of a block, from one matrix product in bf16 or fp32.

A bf16 product takes a quarter of the time of one in fp32, but its scores have 8 bits: ranked by x·c - |c|² / 2, 4 % of
CLIP-like vectors get another of 1,000 centroids. So what is computed is |x - c|² / 2, which is small, and so finely
resolved, where it matters. Where rounding may have put another centroid first, distances are compared in float64, from
the vectors' differences: of CLIP-like vectors 8 % in bf16 (15 to 20 % with 50 to 300 centroids) and 0.3 % in fp32. Rows
with many such rivals are ranked again by a product in float64. So each row is at its nearest centroid in either
precision, and at the first of equally near ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from clipray.analysis.tensors import Precision

Nearest = Callable[[Tensor, Tensor | None], Tensor]
"""From rows (m, d) of any float type and, unless None, their `bf16_rows` to labels (m,) int64. Not thread-safe: reuses buffers."""

LANES = 128  # of the minimum's first step
INF_BITS = 0x7F80  # of bf16
PARTS = 4  # bf16 columns that add up to a float32; three would do, but rows would not be aligned
CLOSE, SLACK = 2**-7, 2**-6  # by how much rounding of bf16 scores, and of the vectors, may lower one
RIVALS = 8  # of a row that are compared one by one; where there are more, all centroids are ranked in float64
EXACT_ROWS = 256  # that are ranked in float64 at a time
TINY = torch.finfo(torch.float32).tiny  # below it relative errors say nothing


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
    longest = c.norm(dim=1).max().item()
    slack, sums = SLACK * longest / math.sqrt(c.shape[1]), _sum_error(table.shape[1], torch.float32)

    def most(best: Tensor) -> Tensor:
        """A score s is off by up to |s| / 256, two together by CLOSE; by what sums of products in float32 round; and, as d
        values of x and c each are rounded, by typically |c| (|s| / d)**0.5 / 512 and nearly three times that at worst:
        `slack` is eight."""
        best = best.float()
        root = best.abs().sqrt()
        return best + best.abs() * CLOSE + root * slack + (root + longest).square() * sums

    def make() -> Nearest:
        scores = table.new_empty(block, len(table))

        def nearest(x: Tensor, rows: Tensor | None) -> Tensor:
            rows = bf16_rows(x.float()) if rows is None else rows
            return _settled(torch.mm(rows, table.T, out=scores[: len(x)]), x, c, most)

        return nearest

    return make


def _ranking_fp32(c: Tensor, block: int) -> Callable[[], Nearest]:
    origin = c.median(0).values  # about which less cancels; a mean would follow one centroid far away
    table = _padded(_points(c, origin), c.shape[1])
    points, norms = table[:, :-1].contiguous(), table[:, -1].contiguous()  # (k', d), (k',)

    def make() -> Nearest:
        values, scores = points.new_empty(block, points.shape[1]), points.new_empty(block, len(points))

        def nearest(x: Tensor, _: Tensor | None) -> Tensor:
            shifted = torch.sub(x, origin, out=values[: len(x)])
            return _settled(torch.addmm(norms, shifted, points.T, out=scores[: len(x)]), x, c, _most(shifted))

        return nearest

    return make


def _points(c: Tensor, origin: Tensor) -> Tensor:
    """Centroids about `origin` as (k, d + 1): -c and |c|² / 2, whose product with x about it and 1 is |x - c|² / 2 - |x|² / 2."""
    c = c - origin
    return torch.cat([-c, c.square().sum(1, keepdim=True) / 2], dim=1)


def _most(x: Tensor) -> Callable[[Tensor], Tensor]:
    """Up to which score a centroid may be nearer to its row of `x` (m, d) than the best of the scores x·(-c) + |c|² / 2.

    Two scores are off by |x| |c| + |c|² / 2 times what a sum rounds. A nearer centroid is no longer than |x| and the
    distance to the best: so one that is far away does not make all rows suspect.
    """
    lengths, error = torch.linalg.vector_norm(x, dim=1), _sum_error(x.shape[1], x.dtype)

    def most(best: Tensor) -> Tensor:
        longest = lengths + (2 * best + lengths.square()).clamp_(min=0).sqrt_()
        return best + longest * (longest + lengths) * error + torch.finfo(x.dtype).tiny

    return most


def _sum_error(n: int, dtype: torch.dtype) -> float:
    """By how much two sums of `n` products may be off, in units of what the products add up to.

    A sum of n is off by n roundings at worst, and by a few times the root of n in practice (Higham and Mary 2019,
    doi 10.1137/18M1226312): eight times is exceeded once in 10**13 sums. Differences and squares round four times more.
    """
    return (min(n, 8 * math.sqrt(n)) + 4) * torch.finfo(dtype).eps


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


def _settled(
    scores: Tensor, x: Tensor, c: Tensor, most: Callable[[Tensor], Tensor], rivals_at_most: int | None = RIVALS
) -> Tensor:
    """Each row's nearest centroid (m,) int64: of the smallest of `scores` (m, k'), or nearer than that in spite of them.

    Args:
        most: from the smallest scores (m,), up to which others may belong to a nearer centroid.
        rivals_at_most: of a row; rows with more are ranked in float64. None: all are compared one by one.
    """
    best, labels, second = _minima(scores)
    bound = most(best)
    close = (second <= bound).nonzero()[:, 0]
    if len(close) == 0:
        return labels
    rivals = _without(scores.index_select(0, close), labels[close])  # an index takes five times as long
    compared = 0
    while len(close):
        second, other, _ = _minima(rivals)
        still = (second <= bound[close]).nonzero()[:, 0]
        close, other = close[still], other[still]
        if compared == rivals_at_most and len(close):
            labels[close] = _exactly(x.index_select(0, close), c)
            break
        compared += 1
        rivals = _without(rivals.index_select(0, still), other)
        labels[close] = _nearer(x.index_select(0, close), c, labels[close], other)
    return labels


def _exactly(x: Tensor, c: Tensor) -> Tensor:
    """Each row's nearest centroid (m,) int64, by a product in float64."""
    wide = c.double()
    origin = wide.median(0).values
    points = _points(wide, origin)

    def nearest(rows: Tensor) -> Tensor:
        shifted = rows.double() - origin
        scores = torch.addmm(points[:, -1], shifted, points[:, :-1].T)
        return _settled(scores, rows, c, _most(shifted), None)

    return torch.cat([nearest(rows) for rows in x.split(EXACT_ROWS)])


def _nearer(x: Tensor, c: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    """Of two centroids for each row of `x` (m, d) the nearer (m,) int64, the first of equal ones: where float32 cannot tell,
    by float64."""
    distances, rivals = _squared(x.float(), c, labels), _squared(x.float(), c, others)
    nearer = rivals < distances
    unsure = ((rivals - distances).abs() <= _sum_error(x.shape[1], torch.float32) * distances + TINY).nonzero()[:, 0]
    if len(unsure):
        x, first, second = x[unsure].double(), labels[unsure], others[unsure]
        distances, rivals = _squared(x, c, first), _squared(x, c, second)
        nearer[unsure] = (rivals < distances) | ((rivals == distances) & (second < first))
    return torch.where(nearer, others, labels)


def _squared(x: Tensor, c: Tensor, labels: Tensor) -> Tensor:
    """|x - c|² of the rows of `x` (m, d) and of some of `c` (k, d), (m,) of the type of `x`."""
    return c.index_select(0, labels).to(x.dtype).sub_(x).square_().sum(1)
