"""Quality of a ranking: average precision, precision and recall of the first k, from counts alone.

Each query has positives, junk and negatives. Junk is taken out of the ranking, so a positive stands behind the negatives
and the positives that come before it; the negatives before each positive determine the whole ranking.

Ties count against the ranking: of rows with equal scores negatives come first. So the figures do not depend on the order
of a table, and vectors that are all alike earn nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RELATIONS = ("easy", "hard", "junk")
EASY, HARD, JUNK = range(3)
PROTOCOLS: Mapping[str, tuple[int, ...]] = {"easy": (EASY,), "medium": (EASY, HARD), "hard": (HARD,)}
"""Relations that are positive; all other relations are junk (Radenović et al. 2018, arXiv 1803.11285, section 3)."""
TOPS = (1, 5, 10)
TIED = 1e-12  # scores that are nearer to each other are equal: a product in float64 is off by a tenth of that, or less


@dataclass(frozen=True)
class QueryFigures:
    """What a ranking is worth to one query.

    Attributes:
        ap: average precision. precision: of the first k, for each of TOPS. n_found: the positives that were found.
        first_rank: of the first positive, from 1; None where none was found. Recall at k, as text-to-image search has it,
            is `first_rank <= k`.
    """

    ap: float
    precision: tuple[float, ...]
    first_rank: int | None
    n_found: int


def average_precision(before: np.ndarray, n_positives: int) -> float:
    """Area under precision and recall, by trapezoids, as Oxford's `compute_ap` and the revisited protocol have it.

    The area between two positives is a trapezoid from the precision just before the later one, 1 where nothing is before
    it, to that at it (Philbin et al. 2007; Radenović et al. 2018).

    Args:
        before: (m,) int64, the negatives before each positive that was found, in any order.
        n_positives: at least m and 1; those that were not found add nothing.
    """
    earlier = np.arange(len(before))
    ranks = np.sort(before) + earlier  # from 0
    precision_before = np.where(ranks == 0, 1.0, earlier / np.maximum(ranks, 1))
    return float(((precision_before + (earlier + 1) / (ranks + 1)) / 2).sum() / n_positives)


def precision_at(before: np.ndarray, n_positives: int, k: int) -> float:
    """Share of positives among the first k; as in the revisited protocol, among fewer where the last one stands before k."""
    if not len(before):
        return 0.0
    ranks = np.sort(before) + np.arange(1, len(before) + 1)
    shown = min(k, int(ranks[-1])) if len(before) == n_positives else k
    return float((ranks <= shown).sum() / shown)


def query_figures(before: np.ndarray, n_positives: int) -> QueryFigures:
    """All figures of a query; arguments as of `average_precision`."""
    first = int(before.min()) + 1 if len(before) else None
    precision = tuple(precision_at(before, n_positives, k) for k in TOPS)
    return QueryFigures(average_precision(before, n_positives), precision, first, len(before))


def means(figures: Sequence[QueryFigures]) -> dict[str, float]:
    """`mAP`, `mP@k` and `recall@k`: the share of queries with a positive among the first k. Of at least one query."""
    precision = np.mean([f.precision for f in figures], axis=0)
    firsts = np.array([np.inf if f.first_rank is None else f.first_rank for f in figures])
    return {
        "mAP": float(np.mean([f.ap for f in figures])),
        **{f"mP@{k}": float(value) for k, value in zip(TOPS, precision, strict=True)},
        **{f"recall@{k}": float((firsts <= k).mean()) for k in TOPS},
    }


def scores(queries: np.ndarray, rows: np.ndarray, distances: Sequence[str]) -> dict[str, np.ndarray]:
    """By distance (q, n) float64, the larger the nearer: cosine (0 of a zero vector), the negative squared Euclidean one.

    Args:
        queries: (q, d) float64. rows: (n, d) of any float type.
    """
    rows = rows.astype(np.float64, copy=False)
    product = queries @ rows.T
    squares, query_squares = np.einsum("nd,nd->n", rows, rows), np.einsum("qd,qd->q", queries, queries)
    by_distance = {}
    if "l2" in distances:
        by_distance["l2"] = 2 * product - squares - query_squares[:, None]
    if "cosine" in distances:
        norms = (np.sqrt(np.where(of > 0, of, 1)) for of in (squares, query_squares[:, None]))
        for norm in norms:
            product /= norm
        by_distance["cosine"] = product
    return by_distance


def thresholds(queries: np.ndarray, positives: np.ndarray, distance: str) -> np.ndarray:
    """(m,) float64: from this score on a row is not behind the positive: that of the positive, less what is a tie.

    Args:
        queries, positives: (m, d) float64, of each pair of a query and a positive.
    """
    product, query_squares, squares = (
        np.einsum("md,md->m", a, b) for a, b in ((queries, positives), (queries, queries), (positives, positives))
    )
    if distance == "l2":
        return 2 * product - query_squares - squares - TIED * (query_squares + squares)
    norms = np.sqrt(query_squares * squares)
    return np.divide(product, norms, out=np.zeros_like(product), where=norms > 0) - TIED


def count_from(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(m,) int64: how many of `values` (n,) are at least each of `starts` (m,)."""
    if not len(starts):
        return np.zeros(0, np.int64)
    near = np.sort(values[values >= starts.min()])
    return len(near) - np.searchsorted(near, starts, side="left")
