"""FAISS indexes: which type, training, filling in parts, merging, and what they really find.

An index is passed on as bytes (uint8), so that it can travel; a part that is filled apart has its rows' numbers as ids.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from clipray.errors import JobError

METRICS = {"cosine": faiss.METRIC_INNER_PRODUCT, "dot": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}
FLAT_ROWS, GRAPH_ROWS = 10_000, 100_000  # up to which `auto` compares with every row, and takes a graph
TRAINING_ROWS = 64  # of a list: faiss asks for 39 and uses 256 at most
TOPS = (1, 10, 100)  # of the recall that is measured
MOST_EF = 4_096


def choose_type(rows: int, width: int, memory_bytes: float) -> str:
    """A factory string after faiss's guidelines: by rows, and by the bytes that the index may take.

    Args:
        memory_bytes: 0 for no bound.
    """
    if rows <= FLAT_ROWS:
        return "Flat"
    fits = not memory_bytes or rows * (4 * width + 8) <= memory_bytes
    if rows <= GRAPH_ROWS and fits:
        return "HNSW32"
    lists = 2 ** round(math.log2(4 * math.sqrt(rows)))
    if fits:
        return f"IVF{lists},Flat"
    code = next((m for m in (64, 48, 32, 24, 16, 8) if m <= width / 2), 0)
    if not code:
        return f"IVF{lists},SQ8"
    return f"OPQ{code}_{code * max(1, min(4, width // code))},IVF{lists},PQ{code}"


def empty_index(kind: str, width: int, metric: str) -> faiss.Index:
    """An untrained index. Raises JobError: faiss knows no such type, or not for this width."""
    try:
        return faiss.index_factory(width, kind, METRICS[metric])
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split(": ", 1)[-1]
        raise JobError(f"type {kind!r}: faiss cannot make it for vectors of {width}: {reason}") from error


def training_rows(index: faiss.Index, rows: int) -> int:
    """How many rows of a table of `rows` to train on; 0 where nothing is trained. Raises JobError: too few rows."""
    if index.is_trained:
        return 0
    ivf = faiss.try_extract_index_ivf(index)
    least = max(ivf.nlist if ivf is not None else 1, 256)  # a product quantiser has 256 centroids
    if rows < least:
        what = f" of {ivf.nlist} lists" if ivf is not None else ""
        raise JobError(
            f"n_samples={rows} should be >= {least} to train an index{what}; take `type: auto` or fewer lists"
        )
    return min(rows, TRAINING_ROWS * max(least, 1024))


def train(index: faiss.Index, x: np.ndarray, random_state: int) -> None:
    """Train in place on (m, d) float32: the lists' centroids by our K-means where they are of whole vectors."""
    centroids = _flat_centroids(index)
    if centroids is not None:
        from clipray.analysis.assignment import LocalShards, Shard
        from clipray.analysis.kmeans import kmeans

        ivf = faiss.extract_index_ivf(index)
        shard = LocalShards([Shard(x, np.arange(len(x)))])
        spherical = ivf.metric_type == faiss.METRIC_INNER_PRODUCT and abs(float(np.square(x).sum(1).mean()) - 1) < 0.01
        found = kmeans(shard, ivf.nlist, max_iterations=10, random_state=random_state, spherical=spherical)
        centroids.add(found.centroids)
    index.train(x)


def _flat_centroids(index: faiss.Index) -> faiss.Index | None:
    """The coarse quantiser of `IVFn,…` where it compares with every centroid, and vectors are not transformed before."""
    outer = faiss.downcast_index(index)
    if not isinstance(outer, faiss.IndexIVF):
        return None
    quantizer = faiss.downcast_index(outer.quantizer)
    return quantizer if isinstance(quantizer, faiss.IndexFlat) else None


def mergeable(index: faiss.Index) -> bool:
    """Whether parts can be filled apart and merged: lists and flat codes can, graphs cannot."""
    return faiss.try_extract_index_ivf(index) is not None or isinstance(
        faiss.downcast_index(index), faiss.IndexFlatCodes
    )


def list_sizes(index: faiss.Index) -> np.ndarray | None:
    """(nlist,) int64 of an index with inverted lists, else None."""
    ivf: Any = faiss.try_extract_index_ivf(index)
    return None if ivf is None else np.array([ivf.invlists.list_size(n) for n in range(ivf.nlist)], np.int64)


def reserve(index: faiss.Index, sizes: np.ndarray) -> None:
    """Room for lists (nlist,) that will be as long as `sizes`; what is in them stays."""
    lists: Any = faiss.extract_index_ivf(index).invlists
    for n, size in enumerate(sizes.tolist()):
        before = lists.list_size(n)
        lists.resize(n, size)
        lists.resize(n, before)


def fill(index: faiss.Index, x: np.ndarray, first_row: int) -> None:
    """Add (n, d) float32 in place, under the ids `first_row`, `first_row` + 1, …"""
    ids = np.arange(first_row, first_row + len(x), dtype=np.int64)
    centroids = _flat_centroids(index)
    if faiss.try_extract_index_ivf(index) is None:
        index.add(x)  # numbered in the order in which parts are merged
    elif centroids is None or not _by_distance(centroids):
        index.add_with_ids(x, ids)
    else:
        from clipray.analysis.assignment import Shard

        table = centroids.reconstruct_n(0, centroids.ntotal)
        shard = Shard(x, ids)
        lists = shard.nearest(table, shard.precision)[0].astype(np.int64)
        faiss.extract_index_ivf(index).add_core(len(x), *(faiss.swig_ptr(a) for a in (x, ids, lists)))


def _by_distance(centroids: faiss.Index) -> bool:
    """Whether the nearest centroid by the index's metric is also the nearest by distance."""
    if centroids.metric_type == faiss.METRIC_L2:
        return True
    lengths = np.square(centroids.reconstruct_n(0, centroids.ntotal)).sum(1)
    return bool(np.ptp(lengths) < 1e-3 * lengths.mean())


def nearest_exactly(
    queries: np.ndarray, x: np.ndarray, metric: str, first_row: int, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Brute force: scores (q, t) float32 and row numbers (q, t) int64 of the `top` best rows of `x`, t <= top."""
    scores, rows = faiss.knn(queries, x, min(top, len(x)), metric=METRICS[metric])
    return scores, rows + first_row


def best_of(parts: Sequence[tuple[np.ndarray, np.ndarray]], metric: str, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The `top` best of all parts; of equal ones the lower row first."""
    scores, rows = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
    keys = scores if metric == "l2" else -scores
    order = np.lexsort((rows, keys), axis=1)[:, :top]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


@dataclass(frozen=True)
class Tuned:
    """What an index finds, and at what effort.

    Attributes:
        parameter, value: `nprobe` or `efSearch`, "" and 0 where there is none.
        recall: mean share of the true k nearest that are among the k found, by k.
        query_ms: for one query, of a batch on all threads.
    """

    parameter: str
    value: int
    recall: dict[int, float]
    query_ms: float


def tune(index: faiss.Index, queries: np.ndarray, own: np.ndarray, truth: np.ndarray, target: float) -> Tuned:
    """The least effort at which recall@10 reaches `target`, or the greatest where none does; set on the index.

    Args:
        queries: (q, d) float32, rows of the index that count as held out: their own rows `own` (q,) int64 are ignored.
        truth: (q, t) int64, the rows that are really nearest, without `own`.
    """
    parameter = effort_of(index)
    if not parameter:
        return _measured(index, "", 0, queries, own, truth)
    most = faiss.extract_index_ivf(index).nlist if parameter == "nprobe" else MOST_EF
    low, value = 0, 1 if parameter == "nprobe" else 16
    found = _measured(index, parameter, value, queries, own, truth)
    while _at_ten(found) < target and value < most:
        low, value = value, min(2 * value, most)
        found = _measured(index, parameter, value, queries, own, truth)
    high = value
    while high - low > max(1, high // 16) and _at_ten(found) >= target and low:
        middle = (low + high) // 2
        tried = _measured(index, parameter, middle, queries, own, truth)
        if _at_ten(tried) >= target:
            high, found = middle, tried
        else:
            low = middle
    set_effort(index, parameter, found.value)
    return found


def effort_of(index: faiss.Index) -> str:
    """The name of the parameter that trades time for recall; "" for an index without one."""
    if faiss.try_extract_index_ivf(index) is not None:
        return "nprobe"
    return "efSearch" if isinstance(faiss.downcast_index(index), faiss.IndexHNSW) else ""


def set_effort(index: faiss.Index, parameter: str, value: int) -> None:
    if parameter:
        faiss.ParameterSpace().set_index_parameter(index, parameter, value)


def _at_ten(tuned: Tuned) -> float:
    return tuned.recall.get(10) or min(tuned.recall.values())


def _measured(
    index: faiss.Index, parameter: str, value: int, queries: np.ndarray, own: np.ndarray, truth: np.ndarray
) -> Tuned:
    set_effort(index, parameter, value)
    top = truth.shape[1]
    began = time.perf_counter()
    found = index.search(queries, top + 1)[1]
    query_ms = (time.perf_counter() - began) * 1e3 / len(queries)
    found = without(found, own, top)
    recall = {k: overlap(found[:, :k], truth[:, :k]) for k in TOPS if k <= top}
    return Tuned(parameter, value, recall or {top: overlap(found, truth)}, query_ms)


def without(found: np.ndarray, own: np.ndarray, top: int) -> np.ndarray:
    """Rows (q, t + 1) with each query's own row taken out, or else the last: (q, top)."""
    kept = found != own[:, None]
    order = np.argsort(~kept, axis=1, kind="stable")
    return np.take_along_axis(found, order, 1)[:, :top]


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean share of the rows of `truth` (q, k) that are in `found` (q, k)."""
    hits = sum(len(np.intersect1d(f, t)) for f, t in zip(found, truth, strict=True))
    return hits / max(1, truth.size)


def expanded(index: faiss.Index, queries: np.ndarray, count: int, alpha: float, metric: str) -> np.ndarray:
    """Query expansion: each query with its `count` first answers added to it, by similarity to the power `alpha`.

    Average query expansion (Chum et al. 2007) has equal weights, `alpha` = 0; weights by similarity are of Radenović et
    al. 2018 (arXiv 1711.02512). Cosines below 0 count as 0. The sum is scaled to unit length for the cosine, else to the
    mean.

    Args:
        queries: (q, d) float32, as the index compares them.
    """
    _, rows, vectors = index.search_and_reconstruct(queries, count)
    return averaged(queries, vectors, rows >= 0, alpha, metric)


def averaged(x: np.ndarray, others: np.ndarray, counted: np.ndarray, alpha: float, metric: str) -> np.ndarray:
    """(q, d) float32: vectors `x` (q, d) with those of `others` (q, k, d) that are `counted` (q, k); see `expanded`."""
    lengths = np.linalg.norm(others, axis=2) * np.linalg.norm(x, axis=1)[:, None]
    cosines = np.einsum("qd,qkd->qk", x, others) / np.maximum(lengths, 1e-12)
    weights = np.where(counted, np.maximum(cosines, 0) ** alpha, 0).astype(np.float32)
    total = x + np.einsum("qk,qkd->qd", weights, np.nan_to_num(others))
    scale = np.linalg.norm(total, axis=1) if metric == "cosine" else 1 + weights.sum(1)
    return np.ascontiguousarray(total / np.maximum(scale, 1e-12)[:, None], np.float32)
