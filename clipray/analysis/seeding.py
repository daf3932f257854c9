"""Where K-means starts: k-means++ on a sample for few clusters, rounds of draws by squared distance for many.

k-means++ takes one pass over its sample per centroid, which is too many beyond some thousand. k-means|| (Bahmani et al.
2012, arXiv 1203.6402) takes a few passes over all vectors, in each of which it draws many rows at once in proportion to
their squared distance from those drawn before; but it draws several times too many, and reducing them to k by k-means++
on the driver costs k passes over more than k vectors: hours at k = 100,000. Here the rounds draw k rows in all, so that
nothing is left to reduce.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from clipray.errors import JobError

FEW = 1000  # clusters, up to which k-means++ is run
SAMPLE = 16, 4096  # vectors of the sample: per cluster, and at least
ROUNDS = 8


class Sampled(Protocol):
    """What seeding asks of a table of vectors (`kmeans.Vectors`)."""

    @property
    def n_samples(self) -> int: ...

    def sample(self, n: int, random_state: int, centroids: np.ndarray | None = None) -> np.ndarray: ...


def seeds(data: Sampled, n_clusters: int, random_state: int) -> np.ndarray:
    """Distinct vectors of the table to start from, (n_clusters, d) float32, the same however it lies in shards.

    Raises:
        JobError: there are fewer distinct vectors than clusters.
    """
    rng = np.random.default_rng(random_state)
    if n_clusters <= FEW:
        per_cluster, least = SAMPLE
        size = min(data.n_samples, max(per_cluster * n_clusters, least))
        chosen = plus_plus(data.sample(size, seed(rng)), n_clusters, rng)
    else:
        chosen = _distinct(data.sample(-(-n_clusters // ROUNDS), seed(rng)))
    while len(chosen) < n_clusters:
        n = min(-(-n_clusters // ROUNDS), n_clusters - len(chosen))
        more = _distinct(data.sample(n, seed(rng), chosen))
        if len(more) == 0:
            raise too_few_vectors(len(chosen), n_clusters)
        chosen = np.concatenate([chosen, more])
    return chosen


def plus_plus(x: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Greedy k-means++ as in scikit-learn (Arthur and Vassilvitskii 2007): at most `k` rows of `x` (m, d), (k, d).

    Each next row is the best of 2 + ln(k) that are drawn in proportion to the squared distance from those chosen. Fewer
    are returned when all others are as good as equal to one of them.
    """
    centred = x - x.mean(0)
    norms = np.einsum("md,md->m", centred, centred)
    noise = 1e-6 * norms.max(initial=0)  # rounding of the squared distances
    chosen, nearest = [int(rng.integers(len(x)))], np.full(len(x), np.inf, dtype=np.float32)
    candidates = np.array(chosen)
    while True:
        distances = norms[candidates, None] + norms - 2 * (centred[candidates] @ centred.T)  # (trials, m)
        distances[distances <= noise] = 0
        np.minimum(distances, nearest, out=distances)
        best = int(distances.sum(1, dtype=np.float64).argmin())
        chosen[-1], nearest = int(candidates[best]), distances[best]
        total = np.cumsum(nearest, dtype=np.float64)
        if len(chosen) == k or total[-1] == 0:
            return x[chosen]
        candidates = np.searchsorted(total, rng.random(2 + int(math.log(k))) * total[-1], side="right")
        chosen.append(-1)


def seed(rng: np.random.Generator) -> int:
    """A `random_state` of its own for one call."""
    return int(rng.integers(2**63))


def too_few_vectors(distinct: int, n_clusters: int) -> JobError:
    return JobError(f"distinct vectors={distinct} should be >= n_clusters={n_clusters}: many vectors are equal")


def _distinct(x: np.ndarray) -> np.ndarray:
    """The first of each set of equal rows, in order."""
    return x[np.sort(np.unique(x, axis=0, return_index=True)[1])]
