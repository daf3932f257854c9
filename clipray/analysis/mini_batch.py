"""Mini-batch K-means (Sculley 2010, doi 10.1145/1772690.1772862), for tables that are read batch by batch.

Where Lloyd's algorithm moves the centroids once in a pass over the table, this moves them after each batch: a few passes
do the work of many, and end within about a percent of the same inertia.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from clipray.analysis.kmeans import (
    Assigned,
    KMeans,
    KMeansData,
    check_unit,
    combine,
    refill,
    started,
    unit_means,
    variance,
)


class Batches(KMeansData, Protocol):
    """Vectors that come in batches."""

    def batches(self, rows: int, random_state: int) -> Sequence[Any]:
        """All vectors in random order, in batches of about `rows`; what a batch is, only `assign_batch` knows."""

    def assign_batch(self, batch: Any, centroids: np.ndarray) -> Assigned:
        """The state of a batch's vectors, each with the nearest of `centroids` (k, d) float32."""


def mini_batch_kmeans(
    data: Batches,
    n_clusters: int,
    batch_rows: int,
    *,
    max_iter: int = 100,
    tol: float = 1e-4,
    random_state: int = 0,
    spherical: bool = False,
    start: np.ndarray | KMeans | None = None,
    on_iteration: Callable[[KMeans], None] | None = None,
) -> KMeans:
    """Passes over the table, each an iteration; arguments, result and errors as of `kmeans.kmeans`.

    Each centroid is the mean of all vectors that it was ever given. One that got none in a whole pass takes half of
    the cluster with the largest inertia, and both begin to count anew. The inertia of a pass is to the centroids that
    each batch found.
    """
    state = started(data, n_clusters, max_iter, tol, random_state, start, spherical)
    while state.n_iterations < max_iter and not state.converged:
        state = _passed(data, state, batch_rows, tol, random_state, spherical)
        if on_iteration is not None:
            on_iteration(state)
    return state


def _passed(data: Batches, state: KMeans, batch_rows: int, tol: float, random_state: int, spherical: bool) -> KMeans:
    rng = np.random.default_rng([random_state, state.n_iterations])
    centroids = state.centroids
    counts = np.zeros(len(centroids), np.int64) if state.counts is None else state.counts
    inertia, whole = 0.0, None
    for batch in data.batches(batch_rows, int(rng.integers(2**63))):
        assigned = data.assign_batch(batch, centroids)
        if spherical:
            check_unit(assigned)
        inertia += float(assigned.inertia(centroids).sum())
        centroids, counts = mini_batch(centroids, counts, assigned, spherical)
        whole = assigned if whole is None else combine([whole, assigned])
    assert whole is not None
    empty = np.flatnonzero(whole.counts == 0)
    if len(empty):
        centroids, counts = _refilled(centroids, counts, empty, whole, data, rng, spherical)
    moves = centroids - state.centroids
    moved = float(np.einsum("kd,kd->", moves, moves, dtype=np.float64))
    converged = moved <= tol * variance(whole) / data.n_features
    return KMeans(centroids, (*state.inertia, inertia), converged, counts)


def _refilled(
    centroids: np.ndarray, counts: np.ndarray, empty: np.ndarray, whole: Assigned, data: Batches,
    rng: np.random.Generator, spherical: bool,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    means = centroids.astype(np.float64)
    refill(means, empty, whole, data, rng)
    changed = (means != centroids).any(axis=1)
    after = (unit_means(means, centroids) if spherical else means).astype(np.float32)
    return np.where(changed[:, None], after, centroids), np.where(changed, 0, counts)


def mini_batch(
    centroids: np.ndarray, counts: np.ndarray, assigned: Assigned, spherical: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The centroids after a batch: each the mean of all vectors that it was ever given, or where it was without any.

    Args:
        centroids: (k, d) float32, before.
        counts: (k,) int64, the vectors given to each before; zeros at first.
        assigned: of the batch, to `centroids`.

    Returns:
        Centroids (k, d) float32 and counts (k,) int64, after.
    """
    total = counts + assigned.counts
    sums = centroids.astype(np.float64) * counts[:, None] + assigned.sums
    means = np.where(total[:, None] > 0, sums / np.maximum(total, 1)[:, None], centroids)
    return (unit_means(means, centroids) if spherical else means).astype(np.float32), total
