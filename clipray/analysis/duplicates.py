"""Rows that are nearly the same: pairs above a cosine, block by block, and the groups that they link.

What a block finds is kept as a forest: as few links as join the same rows. So a thousand copies of an image cost a
thousand links, not half a million, and forests of any blocks, put together, give the same groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BLOCK = 2_048  # rows of a product
CLOSE = 1e-5  # to the threshold: such cosines are computed again in float64, so that blocks make no difference


@dataclass(frozen=True)
class Links:
    """Links between rows, and how like its likest other row each of them is.

    Attributes:
        i, j: (m,) int64, a forest. rows: (n,) int64, sorted and distinct: all that are linked. nearest: (n,) float32.
    """

    i: np.ndarray
    j: np.ndarray
    rows: np.ndarray
    nearest: np.ndarray


def linked(i: np.ndarray, j: np.ndarray, cosines: np.ndarray) -> Links:
    """The `Links` of pairs (m,) of rows."""
    return _forest(i, j, np.concatenate([i, j]), np.concatenate([cosines, cosines]).astype(np.float32))


def merged(parts: Iterable[Links]) -> Links:
    """The `Links` of all parts."""
    parts = list(parts)
    empty = np.zeros(0, np.int64)
    i, j, rows = (np.concatenate([empty, *(getattr(p, name) for p in parts)]) for name in ("i", "j", "rows"))
    values = np.concatenate([np.zeros(0, np.float32), *(p.nearest for p in parts)])
    return _forest(i, j, rows, values)


def _forest(i: np.ndarray, j: np.ndarray, rows: np.ndarray, cosines: np.ndarray) -> Links:
    """The `Links` of pairs (m,) of rows, and of the cosines (r,) that `rows` (r,) have to others."""
    distinct, places = np.unique(rows.astype(np.int64), return_inverse=True)
    nearest = np.full(len(distinct), -np.inf, np.float32)
    np.maximum.at(nearest, places, cosines)
    labels, firsts = _components(i, j, distinct)
    others = np.setdiff1d(np.arange(len(distinct)), firsts)
    return Links(distinct[firsts[labels[others]]], distinct[others], distinct, nearest)


def groups(links: Links) -> np.ndarray:
    """(n,) int64: the group of each of `links.rows`, numbered from 0 by their first rows."""
    labels, firsts = _components(links.i, links.j, links.rows)
    return np.argsort(np.argsort(firsts))[labels].astype(np.int64)


def _components(i: np.ndarray, j: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of sorted `rows` (n,), linked by pairs (m,): the component (n,) of each, and the place of each component's first."""
    at_i, at_j = np.searchsorted(rows, i), np.searchsorted(rows, j)
    graph = coo_array((np.ones(len(i), np.int8), (at_i, at_j)), shape=(len(rows),) * 2)
    labels = connected_components(graph, directed=False)[1]
    return labels, np.unique(labels, return_index=True)[1]


def pairs(a: np.ndarray, b: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of a (n, d) and of b (m, d), float32 of unit length, whose cosine is at least `threshold`: (i, j, cosine)."""
    product = a @ b.T
    i, j = np.nonzero(product >= threshold - CLOSE)
    cosines = product[i, j].astype(np.float64)
    for rows in np.array_split(near := np.flatnonzero(cosines < threshold + CLOSE), len(near) // BLOCK + 1):
        cosines[rows] = np.einsum("nd,nd->n", a[i[rows]].astype(np.float64), b[j[rows]].astype(np.float64))
    kept = cosines >= threshold
    return i[kept], j[kept], cosines[kept]


def within(x: np.ndarray, threshold: float) -> Links:
    """`Links` between the rows of x (n, d), float32 of unit length."""
    starts = range(0, len(x), BLOCK)
    return merged(between(x[start : start + BLOCK], start, x[start:], start, threshold) for start in starts)


def between(a: np.ndarray, a_first: int, b: np.ndarray, b_first: int, threshold: float) -> Links:
    """`Links` of rows of a to rows of b that come later; `a_first`, `b_first`: the numbers of their first rows."""
    parts = []
    for p in range(0, len(a), BLOCK):
        for q in range(0, len(b), BLOCK):
            if b_first + q + BLOCK <= a_first + p:
                continue  # all of it comes earlier
            i, j, cosines = pairs(a[p : p + BLOCK], b[q : q + BLOCK], threshold)
            i, j = i + a_first + p, j + b_first + q
            later = j > i
            if later.any():
                parts.append(linked(i[later], j[later], cosines[later]))
    return merged(parts)


def keepers(labels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(g,) int64: of each group the row that is kept: that which comes first in `order`.

    Args:
        labels: (n,) of groups 0 … g - 1, all of which occur. order: (n,) the rows, the best first.
    """
    return order[np.unique(labels[order], return_index=True)[1]]
