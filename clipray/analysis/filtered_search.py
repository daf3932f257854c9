"""Search among some of the rows of a FAISS index.

FAISS skips the rows that a selector leaves out. Where few rows are left, or where they lie far from the query, the lists
or the edges that an unfiltered search follows lead to none of them. So every row that is left is compared with the query
as long as their codes are few bytes: a few rows are gathered, more are found by a selector in all lists or in a graph's
storage. Beyond that the search is widened by the share of the rows that are left.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import faiss as typed_faiss
import numpy as np

faiss: Any = typed_faiss  # its stubs lack most search parameters
EXACT_BYTES = 512 * 2**20  # of codes that are compared with each query, in about 0.1 s
ID_BYTES = 8  # of a row in an inverted list, which are read to see whether it is left
WIDER = 2  # than the share of the rows that are left asks for
GATHERED_BYTES = 8 * 2**20  # of vectors that are gathered for one query
MANY = 16  # queries for which vectors are gathered from any index, to be compared as a product
MORE = 8  # times as many bytes are gathered for several queries

_mapping = threading.Lock()


def map_rows(index: typed_faiss.Index) -> None:
    """Let `reconstruct` find rows in inverted lists, by 8 bytes a row. Thread-safe."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        with _mapping:
            ivf.make_direct_map()


def search_among(
    index: typed_faiss.Index, queries: np.ndarray, top: int, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As `index.search`, among the rows that are left by a filter. Thread-safe.

    Args:
        queries: (q, d) float32, as the index compares them. mask: (n,) bool, the rows that are left.

    Returns:
        Scores (q, t) float32 and numbers (q, t) int64, the best first, t = `top` or the number of rows that are left; a
        number is -1 where the index finds no more.
    """
    inner = faiss.downcast_index(index)
    while isinstance(inner, faiss.IndexPreTransform):
        for number in range(inner.chain.size()):
            queries = faiss.downcast_VectorTransform(inner.chain.at(number)).apply(queries)
        inner = faiss.downcast_index(inner.index)
    rows = int(np.count_nonzero(mask))
    top = min(top, rows)
    if not top:
        return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
    if not isinstance(inner, faiss.IndexIVF | faiss.IndexHNSW | faiss.IndexFlat | faiss.IndexScalarQuantizer):
        return _widened(inner, queries, top, mask)
    if _gathers(inner, len(queries), rows):
        return _gathered(inner, queries, top, np.flatnonzero(mask))
    selector = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
    if isinstance(inner, faiss.IndexIVF):
        return _in_lists(inner, queries, top, rows, selector)
    if isinstance(inner, faiss.IndexHNSW):
        return _in_graph(inner, queries, top, rows, selector)
    return inner.search(queries, top, params=faiss.SearchParameters(sel=selector))


def first_kept(scores: np.ndarray, numbers: np.ndarray, kept: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `top` answers of each query that are `kept`, all (q, t); a number is -1 where there are no more."""
    order = np.argsort(~kept, axis=1, kind="stable")[:, :top]
    numbers = np.where(kept, numbers, -1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1)


def _gathers(index: Any, queries: int, rows: int) -> bool:
    """Whether vectors are gathered. In lists a selector takes a look at each row's id, 10 ms for a million."""
    share = min(queries, MORE) if queries >= MANY or isinstance(index, faiss.IndexIVF) else 0
    return rows * index.d * 4 <= share * GATHERED_BYTES


def _gathered(index: Any, queries: np.ndarray, top: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    map_rows(index)
    scores, places = faiss.knn(queries, index.reconstruct_batch(rows), top, metric=index.metric_type)
    return scores, rows[places]


def _in_lists(ivf: Any, queries: np.ndarray, top: int, rows: int, selector: Any) -> tuple[np.ndarray, np.ndarray]:
    nprobe = ivf.nlist
    if rows * ivf.code_size + ivf.ntotal * ID_BYTES > EXACT_BYTES:
        nprobe = min(ivf.nlist, math.ceil(WIDER * ivf.nprobe * ivf.ntotal / rows))
    scores, numbers = ivf.search(queries, top, params=faiss.SearchParametersIVF(sel=selector, nprobe=nprobe))
    if nprobe < ivf.nlist and (numbers < 0).any():  # what is left lies in other lists
        return ivf.search(queries, top, params=faiss.SearchParametersIVF(sel=selector, nprobe=ivf.nlist))
    return scores, numbers


def _in_graph(graph: Any, queries: np.ndarray, top: int, rows: int, selector: Any) -> tuple[np.ndarray, np.ndarray]:
    """A graph leads from row to row, also through those that are left out; its storage compares with all that are left."""
    if rows * graph.storage.sa_code_size() > EXACT_BYTES:
        effort, share = max(graph.hnsw.efSearch, top), rows / graph.ntotal
        params = faiss.SearchParametersHNSW(sel=selector, efSearch=math.ceil(WIDER * effort / share))
        scores, numbers = graph.search(queries, effort, params=params)
        if (numbers >= 0).all():  # as many as where the rows that are left are spread evenly
            return scores[:, :top], numbers[:, :top]
    storage = faiss.downcast_index(graph.storage)
    return storage.search(queries, top, params=faiss.SearchParameters(sel=selector))


def _widened(index: Any, queries: np.ndarray, top: int, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By asking for more answers until enough of them are left: an index of any type can do that."""
    rows = int(np.count_nonzero(mask))
    wanted = WIDER * top * len(mask) / rows
    while True:
        scores, numbers = index.search(queries, min(math.ceil(wanted), len(mask)))
        kept = (numbers >= 0) & mask[numbers]
        if wanted >= len(mask) or (kept.sum(axis=1) >= top).all():
            return first_kept(scores, numbers, kept, top)
        wanted *= 4
