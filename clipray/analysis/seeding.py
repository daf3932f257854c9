"""Where K-means starts: greedy k-means++ on a sample, for many clusters in parts of the sample.

k-means++ takes one pass over its sample per centroid; in parts of 1,000 centroids each it stays affordable at 100,000.
k-means|| (Bahmani et al. 2012, arXiv 1203.6402) is not used: with 4k candidates it takes as long as eight iterations,
and as much again to choose k of them. Inertia after 10 iterations on 40,000 vectors in 1,200 clusters, k = 1,500: random
rows 2,573; k-means|| whose rounds draw no more than k 2,455; k-means|| with 4k candidates 2,227; here 2,240 with one
part and 2,345 with five.
"""

from __future__ import annotations

import math

import numpy as np

from clipray.analysis.errors import DataError
from clipray.analysis.kmeans_data import KMeansData

SAMPLE_ROWS = 16, 16_384  # of a cluster, and at least: half as many and a quarter missed rare clusters
SAMPLE_BYTES = 2**29  # at most, unless that is fewer than two vectors of a cluster
PART = 1000  # clusters of a part of the sample
STEPS = 8  # of k-means++ whose candidates are drawn at a time


def seeds(data: KMeansData, n_clusters: int, random_state: int) -> np.ndarray:
    """Distinct vectors of the table to start from, (n_clusters, d) float32, the same however it lies in shards. Raises
    DataError: there are fewer than clusters."""
    rng = np.random.default_rng(random_state)
    per_cluster, least = SAMPLE_ROWS
    affordable = max(SAMPLE_BYTES // (4 * data.n_features), 2 * n_clusters)
    x = data.sample(max(least, min(per_cluster * n_clusters, affordable)), seed(rng))
    chosen = _in_parts(x, n_clusters, rng) if n_clusters > PART else plus_plus(x, n_clusters, rng)
    while len(chosen) < n_clusters:  # vectors of the sample were equal, or parts rounded down
        more = data.sample(n_clusters - len(chosen), seed(rng), chosen)
        if len(more) == 0:
            raise too_few_vectors(len(chosen), n_clusters)
        firsts = np.unique(more, axis=0, return_index=True)[1]  # of equal rows
        chosen = np.concatenate([chosen, more[np.sort(firsts)]])
    return chosen


def plus_plus(x: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """At most `k` rows of `x` (m, d) float32 by k-means++ (Arthur and Vassilvitskii 2007), greedy as in scikit-learn.

    Each next row is the best of 2 + ln(k) that are drawn in proportion to the squared distance from the nearest chosen
    one. Fewer than `k` are returned when all others are as good as equal to one of them.

    Candidates of several steps are drawn at a time, as a product with a few rows takes as long as one with many. One that
    has come nearer to a chosen row since is dropped with the probability by which its distance has shrunk (rejection
    sampling), so those that are left are distributed as if drawn anew.
    """
    centred = x - x.mean(0)
    norms = np.einsum("md,md->m", centred, centred)

    def distances(rows: np.ndarray) -> np.ndarray:
        squares = norms[rows, None] + norms  # (candidates, m)
        result = centred[rows] @ centred.T
        result *= -2
        result += squares
        squares *= 1e-6
        result[result <= squares] = 0  # of equal rows, but for rounding
        return result

    first = rng.integers(len(x), size=1)
    chosen, nearest = [int(first[0])], distances(first)[0]
    while len(chosen) < k and nearest.any():
        steps = min(STEPS, k - len(chosen))
        total = np.cumsum(nearest, dtype=np.float64)
        candidates = np.searchsorted(total, rng.random((steps, 2 + int(math.log(k)))) * total[-1], side="right")
        least = rng.random(candidates.shape) * nearest[candidates]
        for rows, to_rows, bounds in zip(
            candidates, distances(candidates.ravel()).reshape(*candidates.shape, -1), least
        ):
            kept = np.flatnonzero(nearest[rows] > bounds)
            if len(kept):
                after = np.minimum(to_rows[kept], nearest)
                best = int(after.sum(1, dtype=np.float64).argmin())
                nearest = after[best]
                chosen.append(int(rows[kept[best]]))
    return x[chosen]


def _in_parts(x: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Nearly `k` rows of `x`: k-means++ in each part of a coarse clustering, which gets rows in proportion to its inertia."""
    n, norms = -(-k // PART), np.einsum("md,md->m", x, x)
    pivots = x[rng.choice(len(x), n, replace=False)]
    for _ in range(3):
        scores = x @ pivots.T - np.einsum("gd,gd->g", pivots, pivots) / 2  # (m, parts)
        part = scores.argmax(1)
        sizes, inertia = np.bincount(part, minlength=n), np.bincount(part, norms - 2 * scores.max(1), n).clip(0)
        pivots = np.stack([x[part == g].mean(0) if sizes[g] else pivots[g] for g in range(n)])
    shares = inertia if inertia.any() else sizes
    quotas = np.minimum((k * shares / shares.sum()).astype(np.int64), sizes)
    return np.concatenate([plus_plus(x[part == g], quotas[g], rng) for g in np.flatnonzero(quotas)])


def seed(rng: np.random.Generator) -> int:
    """A `random_state` for one sample."""
    return int(rng.integers(2**63))


def too_few_vectors(distinct: int, n_clusters: int) -> DataError:
    return DataError(f"distinct vectors={distinct} should be >= n_clusters={n_clusters}: too many vectors are equal")
