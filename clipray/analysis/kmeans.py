"""K-means against the smallest protocol, so that one process, Ray actors or anything else can hold the vectors.

The vectors' side returns small states (`Assigned`), which `combine`; this side solves for the next centroids. Nothing
here needs torch, which `vector_partition.VectorPartition`, the vectors' side, does.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from clipray.analysis.errors import DataError
from clipray.analysis.normalize import l2_normalize
from clipray.analysis.seeding import seed, seeds, too_few_vectors

TRIED = 5  # iterations of each start, where there are several: by then their order is nearly the final one


@dataclass(frozen=True, eq=False)
class Assigned:
    """What one assignment needs to know of the rows: by cluster their sum, count and sum of squared lengths.

    Rows enter on a grid of about 2**-33 of the longest vector, on which float64 adds up millions of rows a cluster
    without rounding. So the states of any split of the rows combine to the same bits if the longest vectors of the
    shards are nearly of one length, as normalised ones are (exactly: if `length * 2**0.5` has the same binary exponent),
    and otherwise to 1e-10 of it.

    Attributes:
        sums: (k, d) float64.
        counts: (k,) int64.
        squares: (k,) float64.
    """

    sums: np.ndarray
    counts: np.ndarray
    squares: np.ndarray

    def inertia(self, centroids: np.ndarray) -> np.ndarray:
        """Squared distances of each cluster's rows to its centroid, summed up: (k, d) float32 -> (k,) float64."""
        c = centroids.astype(np.float64)
        crossed, norms = (np.einsum("kd,kd->k", c, other) for other in (self.sums, c))
        return np.maximum(self.squares - 2 * crossed + self.counts * norms, 0)


def combine(states: Iterable[Assigned]) -> Assigned:
    """The state of all rows from those of its parts, in any order and grouping; at least one."""
    first, *others = states
    sums, counts, squares = first.sums.copy(), first.counts.copy(), first.squares.copy()
    for state in others:
        sums += state.sums
        counts += state.counts
        squares += state.squares
    return Assigned(sums, counts, squares)


class KMeansData(Protocol):
    """A table of n vectors of d values, wherever it lies."""

    @property
    def n_samples(self) -> int: ...

    @property
    def n_features(self) -> int: ...

    def assign(self, centroids: np.ndarray) -> Assigned:
        """The state of all vectors, each with the nearest of `centroids` (k, d) float32; a function of these alone."""

    def sample(self, n: int, random_state: int, centroids: np.ndarray | None = None) -> np.ndarray:
        """At most `n` vectors (m, d) float32 in an order that depends on neither shards nor positions.

        Without replacement; uniform or, given centroids (k, d) float32, in proportion to the squared distance from the
        nearest, so that none equals a centroid and fewer than `n` come if fewer differ from all.
        """


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
    max_iter: int = 100,
    tol: float = 1e-4,
    random_state: int = 0,
    spherical: bool = False,
    start: np.ndarray | KMeans | None = None,
    on_iteration: Callable[[KMeans], None] | None = None,
) -> KMeans:
    """Lloyd's algorithm (1982), with empty clusters refilled.

    An iteration assigns all vectors and moves each centroid to the mean of its own, rounded to float32. An empty cluster
    takes half of the one with the largest inertia, or else a vector that differs from all centroids.

    Args:
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
    state = started(data, n_clusters, max_iter, tol, random_state, start, spherical)
    while state.n_iterations < max_iter and not state.converged:
        assigned = data.assign(state.centroids)
        if spherical:
            check_unit(assigned)
        rng = np.random.default_rng([random_state, state.n_iterations])
        state = _iterated(data, state, assigned, tol, spherical, rng)
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
        kmeans(
            data, n_clusters, max_iter=TRIED, tol=0, random_state=random_state, spherical=spherical, start=start
        )
        for start in starts
    ]  # fmt: skip
    return starts[int(np.argmin([state.inertia[-1] for state in tried]))]


def started(
    data: KMeansData,
    n_clusters: int,
    max_iter: int,
    tol: float,
    random_state: int,
    start: object,
    spherical: bool,
) -> KMeans:
    """The state before the first iteration, or the given one. Raises as `kmeans` does."""
    for name, value, least in (("n_clusters", n_clusters, 1), ("max_iter", max_iter, 1)):
        if value < least:
            raise ValueError(f"{name}={value} should be >= {least}")
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
        return KMeans(unit_means(state.centroids, state.centroids).astype(np.float32))
    return state


def _iterated(
    data: KMeansData, state: KMeans, assigned: Assigned, tol: float, spherical: bool, rng: np.random.Generator
) -> KMeans:
    inertia = float(assigned.inertia(state.centroids).sum())
    means = assigned.sums / np.maximum(assigned.counts, 1)[:, None]
    empty = np.flatnonzero(assigned.counts == 0)
    if len(empty):
        means[empty] = state.centroids[empty]
        refill(means, empty, assigned, data, rng)
    centroids = (unit_means(means, state.centroids) if spherical else means).astype(np.float32)
    moves = centroids - state.centroids
    moved = float(np.einsum("kd,kd->", moves, moves, dtype=np.float64))
    return KMeans(centroids, (*state.inertia, inertia), moved <= tol * variance(assigned) / data.n_features)


def refill(
    means: np.ndarray, empty: np.ndarray, assigned: Assigned, data: KMeansData, rng: np.random.Generator
) -> None:
    """Writes to `means` (k, d) of the `empty` clusters and of those that are split for them.

    The halves of a cluster lie to either side of its mean, a quarter of its radius away on a random line. Clusters whose
    inertia may be but rounding are not split.
    """
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


def variance(assigned: Assigned) -> float:
    """Variance of all vectors, summed over the columns."""
    n = assigned.counts.sum()
    return max(0.0, float(assigned.squares.sum() / n - np.square(assigned.sums.sum(0) / n).sum()))


def check_unit(assigned: Assigned) -> None:
    mean = assigned.squares.sum() / assigned.counts.sum()
    if abs(mean - 1) > 0.02:
        raise DataError(f"spherical=True takes vectors of unit length, mean squared length={mean:.6g} should be 1")


def unit_means(means: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length; those of length 0 are taken from `otherwise`."""
    return np.where(means.any(axis=1, keepdims=True), l2_normalize(means), otherwise)
