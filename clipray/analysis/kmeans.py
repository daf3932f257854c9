"""K-means against the smallest protocol, so that one process, Ray actors or anything else can hold the vectors.

The vectors' side returns small states (`kmeans_data.Assigned`); this side solves for the next centroids.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clipray.analysis.errors import DataError
from clipray.analysis.kmeans_data import Assigned, Batches, KMeansData, combine
from clipray.analysis.normalize import l2_normalize
from clipray.analysis.seeding import seed, seeds, too_few_vectors

TRIED = 5  # iterations of each start, where there are several: by then their order is nearly the final one


@dataclass(frozen=True, eq=False)
class KMeans:
    """Where K-means stands after an iteration: all that it needs to go on.

    Attributes:
        centroids: (k, d) float32, the next to assign to.
        inertia: of each iteration so far, to the centroids that it began with.
        converged: they hardly moved in the last one.
        counts: (k,) int64, of mini-batches: the vectors that each centroid is the mean of.
    """

    centroids: np.ndarray
    inertia: tuple[float, ...] = ()
    converged: bool = False
    counts: np.ndarray | None = None

    @property
    def n_iterations(self) -> int:
        return len(self.inertia)


def kmeans(
    data: KMeansData,
    n_clusters: int,
    *,
    batch_rows: int | None = None,
    max_iter: int = 100,
    tol: float = 1e-4,
    random_state: int = 0,
    spherical: bool = False,
    start: np.ndarray | KMeans | None = None,
    on_iteration: Callable[[KMeans], None] | None = None,
) -> KMeans:
    """Lloyd's algorithm (1982), with empty clusters refilled; or mini-batches, for tables that are read batch by batch.

    An iteration assigns all vectors and moves each centroid to the mean of its own, rounded to float32. An empty cluster
    takes half of the one with the largest inertia, or else a vector that differs from all centroids.

    Mini-batches (Sculley 2010, doi 10.1145/1772690.1772862) move the centroids after each batch: a few iterations do the
    work of many, and end within about a percent of the same inertia. Each centroid is the mean of all vectors that it was
    ever given; one that is refilled, and the one that it was taken from, begin to count anew. The inertia of an iteration
    is to the centroids that each batch found.

    Args:
        batch_rows: of a mini-batch; `data` are then `Batches`. None: Lloyd's algorithm.
        tol: stops when the squared moves of all centroids add up to at most this times the mean variance of a
            column, as scikit-learn does; 0 stops when no vector changes clusters.
        random_state: of the start and of refilling; any integer >= 0.
        spherical: centroids have unit length, and so should the vectors have: nearest is then of the largest cosine.
        start: (n_clusters, d) to start from, or a state that `on_iteration` was given: the result is the same to the
            bit as if it had not been interrupted.
        on_iteration: called with the state after each iteration.

    Raises:
        DataError: fewer vectors, or distinct vectors, than clusters; `spherical` and vectors of other lengths.
        ValueError: an argument out of range, or `start` of another shape or not finite.
    """
    state = _started(data, n_clusters, max_iter, tol, random_state, start, spherical)
    while state.n_iterations < max_iter and not state.converged:
        rng = np.random.default_rng([random_state, state.n_iterations])
        if batch_rows is None:
            state = _lloyd(data, state, tol, spherical, rng)
        else:
            assert isinstance(data, Batches)
            state = _mini_batches(data, batch_rows, state, tol, spherical, rng)
        if on_iteration is not None:
            on_iteration(state)
    return state


def best_start(
    data: KMeansData, n_clusters: int, n_init: int, random_state: int, spherical: bool = False
) -> np.ndarray:
    """Of `n_init` starts (n_clusters, d) float32 the one that has the lowest inertia after TRIED iterations over all vectors.

    The first is that of `kmeans`; the others have samples and random numbers of their own. Raises as `kmeans` does.
    """
    rng = np.random.default_rng([random_state, n_init])
    states = [random_state, *(seed(rng) for _ in range(n_init - 1))]
    starts = [seeds(data, n_clusters, state) for state in states]
    tried = [
        kmeans(data, n_clusters, max_iter=TRIED, tol=0, random_state=random_state, spherical=spherical, start=start)
        for start in starts
    ]
    return starts[int(np.argmin([state.inertia[-1] for state in tried]))]


def _started(
    data: KMeansData, n_clusters: int, max_iter: int, tol: float, random_state: int, start: object, spherical: bool
) -> KMeans:
    """The state before the first iteration, or the given one. Raises as `kmeans` does."""
    for name, value in {"n_clusters": n_clusters, "max_iter": max_iter}.items():
        if value < 1:
            raise ValueError(f"{name}={value} should be >= 1")
    if not tol >= 0 or random_state < 0:
        raise ValueError(f"tol={tol}, random_state={random_state} should be >= 0")
    if data.n_samples < n_clusters:
        raise DataError(f"n_samples={data.n_samples} should be >= n_clusters={n_clusters}")
    if start is None:
        start = seeds(data, n_clusters, random_state)
    state = start if isinstance(start, KMeans) else KMeans(np.array(start, dtype=np.float32))
    if state.centroids.shape != (n_clusters, data.n_features) or not np.isfinite(state.centroids).all():
        raise ValueError(
            f"start has shape {state.centroids.shape}, expected ({n_clusters}, {data.n_features}), all finite"
        )
    if spherical and state.n_iterations == 0:
        return KMeans(_rounded(state.centroids, state.centroids, spherical))
    return state


def _lloyd(data: KMeansData, state: KMeans, tol: float, spherical: bool, rng: np.random.Generator) -> KMeans:
    assigned = data.assign(state.centroids)
    if spherical:
        _check_unit(assigned)
    means = _means(assigned.sums, assigned.counts, state.centroids)
    _refill(means, assigned, data, rng)
    inertia = float(assigned.inertia(state.centroids).sum())
    return _moved(state, _rounded(means, state.centroids, spherical), assigned, inertia, tol)


def _mini_batches(
    data: Batches, batch_rows: int, state: KMeans, tol: float, spherical: bool, rng: np.random.Generator
) -> KMeans:
    centroids = state.centroids
    counts = np.zeros(len(centroids), np.int64) if state.counts is None else state.counts
    inertia, whole = 0.0, None
    for batch in data.batches(batch_rows, int(rng.integers(2**63))):
        assigned = data.assign_batch(batch, centroids)
        if spherical:
            _check_unit(assigned)
        inertia += float(assigned.inertia(centroids).sum())
        centroids, counts = mini_batch(centroids, counts, assigned, spherical)
        whole = assigned if whole is None else combine([whole, assigned])
    assert whole is not None
    means = centroids.astype(np.float64)
    _refill(means, whole, data, rng)
    changed = (means != centroids).any(axis=1)
    centroids = np.where(changed[:, None], _rounded(means, centroids, spherical), centroids)
    return _moved(state, centroids, whole, inertia, tol, np.where(changed, 0, counts))


def mini_batch(
    centroids: np.ndarray, counts: np.ndarray, assigned: Assigned, spherical: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The centroids after a batch: each the mean of all vectors that it was ever given, or where it was without any.

    Args:
        centroids: (k, d) float32 before the batch. counts: (k,) int64, the vectors given to each; zeros at first.
        assigned: of the batch, to `centroids`.

    Returns:
        The same two after the batch.
    """
    total = counts + assigned.counts
    means = _means(centroids.astype(np.float64) * counts[:, None] + assigned.sums, total, centroids)
    return _rounded(means, centroids, spherical), total


def _means(sums: np.ndarray, counts: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """(k, d) float64 means of clusters; those of empty ones are taken from `otherwise`."""
    means: np.ndarray = sums / np.maximum(counts, 1)[:, None]
    means[counts == 0] = otherwise[counts == 0]
    return means


def _rounded(means: np.ndarray, before: np.ndarray, spherical: bool) -> np.ndarray:
    """Centroids (k, d) float32 at the means; if `spherical` of unit length, those of length 0 stay where they were."""
    if spherical:
        means = np.where(means.any(axis=1, keepdims=True), l2_normalize(means), before)
    return means.astype(np.float32)


def _moved(
    state: KMeans, centroids: np.ndarray, assigned: Assigned, inertia: float, tol: float,
    counts: np.ndarray | None = None,
) -> KMeans:  # fmt: skip
    """The state after an iteration in which all vectors were `assigned`."""
    moves = centroids - state.centroids
    squared_moves = float(np.einsum("kd,kd->", moves, moves, dtype=np.float64))
    converged = squared_moves <= tol * _variance(assigned) / centroids.shape[1]
    return KMeans(centroids, (*state.inertia, inertia), converged, counts)


def _refill(means: np.ndarray, assigned: Assigned, data: KMeansData, rng: np.random.Generator) -> None:
    """Writes to `means` (k, d) of the clusters that are empty and of those that are split for them.

    The halves of a cluster lie to either side of its mean, a quarter of its radius away on a random line. Clusters whose
    inertia may be but rounding are not split.
    """
    empty = np.flatnonzero(assigned.counts == 0)
    if not len(empty):
        return
    inertia = assigned.inertia(means.astype(np.float32))
    radii = np.sqrt(inertia / np.maximum(assigned.counts, 1))
    largest = [(-float(inertia[i]), int(i)) for i in np.flatnonzero(inertia > 1e-6 * assigned.squares)]
    heapq.heapify(largest)
    split = empty[: len(empty) if largest else 0]
    for i in split:
        negative, donor = heapq.heappop(largest)
        line = rng.normal(size=means.shape[1])
        step = line * (radii[donor] / 4 / np.linalg.norm(line))
        means[i], means[donor], radii[i] = means[donor] - step, means[donor] + step, radii[donor]
        for half in (donor, int(i)):
            heapq.heappush(largest, (negative / 2, half))
    if len(split) < len(empty):
        vectors = data.sample(len(empty), seed(rng), means.astype(np.float32))
        if len(vectors) == 0:
            raise too_few_vectors(len(means) - len(empty), len(means))
        means[empty[: len(vectors)]] = vectors


def _variance(assigned: Assigned) -> float:
    """Variance of all vectors, summed over the columns."""
    n = assigned.counts.sum()
    return max(0.0, float(assigned.squares.sum() / n - np.square(assigned.sums.sum(0) / n).sum()))


def _check_unit(assigned: Assigned) -> None:
    mean = assigned.squares.sum() / assigned.counts.sum()
    if abs(mean - 1) > 0.02:
        raise DataError(f"spherical=True takes vectors of unit length, mean squared length={mean:.6g} should be 1")
