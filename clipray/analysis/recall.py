"""Recall: the share of the true nearest rows that an index returns, and the least effort that reaches a target.

Rows count by their distance, not by their number (the idea is of faiss's `contrib/evaluation.py`): where several are as
far as the k-th nearest, any of them counts as correct. So vectors that occur many times cost no recall.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import faiss
import numpy as np

from clipray.analysis.vector_index import METRICS, effort_of, set_effort

TOPS = (1, 10, 100)  # of the recall that is measured
TIED = 1e-6  # of a distance: float32 ranks rows that are nearer to each other in any order
MOST_EF = 4_096
VALUES = 2**23  # of vectors that are compared at a time


@dataclass(frozen=True, eq=False)
class Nearest:
    """The rows nearest to each query, the nearest first.

    Attributes:
        distances: (q, t) float64, the smaller the nearer: squared distances, or negative products.
        numbers: (q, t) int64, of the rows in the index.
    """

    distances: np.ndarray
    numbers: np.ndarray

    @property
    def top(self) -> int:
        return self.numbers.shape[1]

    def of(self, queries: slice) -> Nearest:
        return Nearest(self.distances[queries], self.numbers[queries])


@dataclass(frozen=True, eq=False)
class Queries:
    """Vectors (q, d) float32, as the index compares them, and what is really nearest to them in it."""

    x: np.ndarray
    nearest: Nearest


def nearest_exactly(xq: np.ndarray, xb: np.ndarray, metric: str, numbers: np.ndarray, top: int) -> Nearest:
    """Brute force over the rows `xb` (n, d) float32, which have the `numbers` (n,) int64; at most `top` of each query."""
    top = min(top, len(xb))
    if not top or not len(xq):
        return Nearest(np.zeros((len(xq), top)), np.zeros((len(xq), top), np.int64))
    _, rows = faiss.knn(xq, xb, top, metric=METRICS[metric])
    distances = np.concatenate(
        [_distances(xq[block], xb[rows[block]], metric) for block in _blocks(len(xq), top * xb.shape[1])]
    )
    return Nearest(distances, numbers[rows])


def best_of(parts: Sequence[Nearest], top: int) -> Nearest:
    """The `top` nearest of all parts; of equally near ones the lower number first."""
    distances = np.concatenate([part.distances for part in parts], axis=1)
    numbers = np.concatenate([part.numbers for part in parts], axis=1)
    order = np.lexsort((numbers, distances), axis=1)[:, :top]
    return Nearest(np.take_along_axis(distances, order, 1), np.take_along_axis(numbers, order, 1))


def tune(index: faiss.Index, queries: Queries, metric: str, target: float) -> tuple[str, int]:
    """The least effort at which recall@10 reaches `target`, or the greatest where none does; set on the index.

    Where there are fewer than ten rows, recall@1. Returns `nprobe` or `efSearch`, and its value; "" and 0 where an index
    has none.
    """
    parameter = effort_of(index)
    if not parameter:
        return "", 0
    k = 10 if queries.nearest.top >= 10 else 1

    def reached(value: int) -> bool:
        set_effort(index, parameter, value)
        return recall_at(index, queries, metric, k) >= target

    most = faiss.extract_index_ivf(index).nlist if parameter == "nprobe" else MOST_EF
    low, high = 0, 1 if parameter == "nprobe" else 16
    enough = reached(high)
    while not enough and high < most:
        low, high = high, min(2 * high, most)
        enough = reached(high)
    while enough and low and high - low > max(1, high // 16):
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    set_effort(index, parameter, high)
    return parameter, high


def recalls(index: faiss.Index, queries: Queries, metric: str) -> dict[str, float]:
    """`recall@k` for each of TOPS that has so many rows, at the effort that is set."""
    tops = [k for k in TOPS if k <= queries.nearest.top]
    return {f"recall@{k}": round(recall_at(index, queries, metric, k), 4) for k in tops}


def recall_at(index: faiss.Index, queries: Queries, metric: str, k: int) -> float:
    """Mean share of k answers that are no farther than the k-th nearest row."""
    blocks = _blocks(len(queries.x), k * queries.x.shape[1])
    hits = sum(_hits(index, queries.x[block], queries.nearest.of(block), metric, k).sum() for block in blocks)
    return float(hits / (k * len(queries.x)))


def query_ms(index: faiss.Index, x: np.ndarray, top: int = 10) -> float:
    """Milliseconds for one of the queries (q, d) float32, of a batch on all threads."""
    began = time.perf_counter()
    index.search(x, top)
    return round((time.perf_counter() - began) * 1e3 / len(x), 3)


def _hits(index: faiss.Index, xq: np.ndarray, nearest: Nearest, metric: str, k: int) -> np.ndarray:
    """(q, k) bool: whether an answer is one of the k nearest."""
    kth = nearest.distances[:, k - 1, None]
    limits = kth + TIED * np.abs(kth)  # up to such a distance a row is one of the k nearest
    # Those keep the vectors as they are; others keep codes of them.
    if isinstance(faiss.downcast_index(index), faiss.IndexFlat | faiss.IndexIVFFlat | faiss.IndexHNSWFlat):
        _, numbers, vectors = index.search_and_reconstruct(xq, k)
        return (numbers >= 0) & (_distances(xq, vectors, metric) <= limits)
    scores, numbers = index.search(xq, k)
    counted = np.where(nearest.distances <= limits, nearest.numbers, -1)
    hits = (numbers[:, :, None] == counted[:, None, :]).any(2) & (numbers >= 0)
    # Equal vectors have equal codes, and there may be more of them than `nearest` names.
    equal = (scores[:, :, None] == np.where(hits, scores, np.nan)[:, None, :]).any(2)
    return hits | (equal & (numbers >= 0))


def _distances(queries: np.ndarray, x: np.ndarray, metric: str) -> np.ndarray:
    """(q, t) float64 of queries (q, d) from rows (q, t, d) of each: see `Nearest`."""
    wide = x.astype(np.float64)
    if metric == "l2":
        wide -= queries[:, None]
        return np.einsum("qtd,qtd->qt", wide, wide)
    return -np.einsum("qd,qtd->qt", queries.astype(np.float64), wide)


def _blocks(n: int, values: int) -> Iterator[slice]:
    """Of n queries with so many values each."""
    rows = max(1, VALUES // max(1, values))
    return (slice(start, start + rows) for start in range(0, n, rows))
