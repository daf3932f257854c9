"""Re-ranking: the first images of an answer in the order of their region that is most like the query."""

from __future__ import annotations

import functools

import numpy as np

from clipray.inputs.index_reader import OpenIndex


def best_regions(
    images: OpenIndex, regions: OpenIndex, queries: np.ndarray, numbers: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order each query's images anew.

    Args:
        queries: (q, d) float32, as the indexes compare them. numbers: (q, t) int64 of images; known: (q, t) bool.

    Returns:
        Scores (q, t) float32 by the metric of `regions`, numbers (q, t), -1 behind the last, and the id of each one's
        best region (q, t). Images without regions come last, in the order that they had.
    """
    owners, vectors = _by_image(regions), _vectors(regions)
    names = images.ids["image_id"].to_numpy(zero_copy_only=False)
    region_ids = regions.ids["region_id"].to_numpy(zero_copy_only=False)
    nearer = -1.0 if regions.metric == "l2" else 1.0
    scores = np.full(numbers.shape, -nearer * np.inf, np.float32)
    best = np.full(numbers.shape, "", object)
    for q, row in enumerate(numbers):
        for n in np.flatnonzero(known[q]):
            members = owners.get(names[row[n]])
            if members is None:
                continue
            similarity = _compared(vectors[members], queries[q], regions.metric)
            place = int((nearer * similarity).argmax())
            scores[q, n], best[q, n] = similarity[place], region_ids[members[place]]
    order = np.argsort(np.where(known, -nearer * scores, np.inf), axis=1, kind="stable")
    kept = np.take_along_axis(np.where(known, numbers, -1), order, 1)
    return np.take_along_axis(scores, order, 1), kept, np.take_along_axis(best, order, 1)


def _compared(vectors: np.ndarray, query: np.ndarray, metric: str) -> np.ndarray:
    return np.square(vectors - query).sum(1) if metric == "l2" else vectors @ query


@functools.lru_cache(2)
def _by_image(regions: OpenIndex) -> dict[str, np.ndarray]:
    """Numbers of the regions of each image."""
    names = regions.ids["image_id"].to_numpy(zero_copy_only=False)
    order = np.argsort(names, kind="stable")
    edges = np.flatnonzero(names[order][1:] != names[order][:-1]) + 1
    return {names[part[0]]: part for part in np.split(order, edges) if len(part)}


@functools.lru_cache(2)
def _vectors(regions: OpenIndex) -> np.ndarray:
    """All region vectors (n, d) float32, as the index holds them."""
    return regions.index.reconstruct_n(0, regions.index.ntotal)
