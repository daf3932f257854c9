"""FAISS indexes: which type, training, filling in parts, merging, query expansion. What they really find: `recall`.

An index is passed on as bytes (uint8), so that it can travel; a part that is filled apart has its rows' numbers as ids.
"""

from __future__ import annotations

import math
from typing import Any

import faiss
import numpy as np

from clipray.analysis.errors import DataError

METRICS = {"cosine": faiss.METRIC_INNER_PRODUCT, "dot": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}
FLAT_ROWS, GRAPH_ROWS = 10_000, 100_000  # up to which `auto` compares with every row, and takes a graph
TRAINING_ROWS = 64  # of a list: faiss asks for 39 and uses 256 at most


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


def empty_index(description: str, width: int, metric: str) -> faiss.Index:
    """An untrained index. Raises DataError: faiss knows no such type, or not for this width."""
    try:
        return faiss.index_factory(width, description, METRICS[metric])
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split(": ", 1)[-1]
        raise DataError(f"type {description!r}: faiss cannot make it for vectors of {width}: {reason}") from error


def training_rows(index: faiss.Index, rows: int) -> int:
    """How many rows of a table of `rows` to train on; 0 where nothing is trained. Raises DataError: too few rows."""
    if index.is_trained:
        return 0
    ivf, least = faiss.try_extract_index_ivf(index), least_rows(index)
    if rows < least:
        what = f" of {ivf.nlist} lists" if ivf is not None else ""
        raise DataError(
            f"n_samples={rows} should be >= {least} to train an index{what}; take `type: auto` or fewer lists"
        )
    return min(rows, TRAINING_ROWS * max(least, 1024))


def least_rows(index: faiss.Index) -> int:
    """How many rows training takes at least."""
    ivf = faiss.try_extract_index_ivf(index)
    return max(ivf.nlist if ivf is not None else 1, 256)  # a product quantiser has 256 centroids


def train(index: faiss.Index, x: np.ndarray, random_state: int) -> None:
    """Train in place on (m, d) float32: the lists' centroids by our K-means where they are of whole vectors."""
    centroids = _flat_centroids(index)
    if centroids is not None:
        from clipray.analysis.kmeans import kmeans
        from clipray.analysis.vector_partition import VectorPartition

        ivf = faiss.extract_index_ivf(index)
        shard = VectorPartition(x, np.arange(len(x)))
        spherical = ivf.metric_type == faiss.METRIC_INNER_PRODUCT and abs(float(np.square(x).sum(1).mean()) - 1) < 0.01
        fitted = kmeans(shard, ivf.nlist, max_iter=10, random_state=random_state, spherical=spherical)
        centroids.add(fitted.centroids)
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


def extendable(index: faiss.Index) -> bool:
    """Whether rows can be added to an index that holds some already: an NSG is built once."""
    return not isinstance(faiss.downcast_index(index), faiss.IndexNSG)


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
        from clipray.analysis.vector_partition import VectorPartition

        table = centroids.reconstruct_n(0, centroids.ntotal)
        shard = VectorPartition(x, ids)
        lists = shard.nearest(table, shard.precision)[0].astype(np.int64)
        faiss.extract_index_ivf(index).add_core(len(x), *(faiss.swig_ptr(a) for a in (x, ids, lists)))


def _by_distance(centroids: faiss.Index) -> bool:
    """Whether the nearest centroid by the index's metric is also the nearest by distance."""
    if centroids.metric_type == faiss.METRIC_L2:
        return True
    lengths = np.square(centroids.reconstruct_n(0, centroids.ntotal)).sum(1)
    return bool(np.ptp(lengths) < 1e-3 * lengths.mean())


def without_prefetch(index: faiss.Index) -> None:
    """Let a search read lists on disk as it comes to them.

    By default it starts up to 32 threads, which read all of its lists as a whole: of 1,000,000 vectors in memory that takes
    three times as long, and with a filter, whose lists are many, ten times.
    """
    ivf: Any = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        lists: Any = faiss.downcast_InvertedLists(ivf.invlists)
        if isinstance(lists, faiss.OnDiskInvertedLists):
            lists.prefetch_nthread = 0


def effort_of(index: faiss.Index) -> str:
    """The name of the parameter that trades time for recall; "" for an index without one."""
    if faiss.try_extract_index_ivf(index) is not None:
        return "nprobe"
    return "efSearch" if isinstance(faiss.downcast_index(index), faiss.IndexHNSW) else ""


def set_effort(index: faiss.Index, parameter: str, value: int) -> None:
    if parameter:
        faiss.ParameterSpace().set_index_parameter(index, parameter, value)


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
