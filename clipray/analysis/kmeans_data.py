"""What K-means asks of a table of vectors, wherever it lies, and how the shards of the table answer.

A shard answers with a small state, its sums by cluster (`Assigned`) or its candidates for a sample (`Draw`). States of
any split of the rows combine to the same result. Nothing here needs torch, which `vector_partition.VectorPartition` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np


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


@runtime_checkable
class Batches(KMeansData, Protocol):
    """Vectors that come in batches."""

    def batches(self, rows: int, random_state: int) -> Sequence[Any]:
        """All vectors in random order, in batches of about `rows`; what a batch is, only `assign_batch` knows."""

    def assign_batch(self, batch: Any, centroids: np.ndarray) -> Assigned:
        """The state of a batch's vectors, each with the nearest of `centroids` (k, d) float32."""


@dataclass(frozen=True, eq=False)
class Assigned:
    """What one assignment needs to know of the rows: by cluster their sum, count and sum of squared lengths.

    Rows enter on a grid of about 2**-33 of the longest vector, on which float64 adds up millions of rows a cluster
    without rounding. So the states of any split of the rows combine to the same bits if the longest vectors of the
    shards are nearly of one length, as normalised ones are (exactly: if `length * 2**0.5` has the same binary exponent),
    and otherwise to 1e-10 of it.

    Attributes:
        sums: (k, d) float64. counts: (k,) int64. squares: (k,) float64.
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


@dataclass(frozen=True, eq=False)
class Draw:
    """A shard's candidates, the lowest priority first.

    Attributes:
        priorities: (m,) float64, finite. keys: (m,) uint64. rows: (m,) int64, within the shard.
    """

    priorities: np.ndarray
    keys: np.ndarray
    rows: np.ndarray


def draw(keys: np.ndarray, n: int, random_state: int, weights: np.ndarray | None = None) -> Draw:
    """At most `n` rows without replacement, in proportion to `weights` if there are any.

    The priority of a row is -ln(u) / weight, u in (0, 1) (Efraimidis and Spirakis 2006, doi 10.1016/j.ipl.2005.11.003).

    Args:
        keys: (m,) uint64, distinct among all shards.
        weights: (m,) float64, not below 0. A row of weight 0 is never drawn.
    """
    bits = _mixed(keys ^ _mixed(np.array([random_state % 2**64], dtype=np.uint64)))
    priorities = -np.log(((bits >> np.uint64(11)) + 0.5) * 2.0**-53)
    if weights is not None:
        with np.errstate(divide="ignore"):
            priorities /= weights
    rows = np.argpartition(priorities, n)[:n] if n < len(priorities) else np.arange(len(priorities))
    rows = rows[np.isfinite(priorities[rows])]
    rows = rows[np.lexsort((keys[rows], priorities[rows]))]
    return Draw(priorities[rows], keys[rows], rows)


def merged(draws: Sequence[Draw], n: int) -> Draw:
    """The `Draw` of at most `n` of a shard from those of its parts, at least one, whose rows already count through it."""
    priorities, keys, rows = (np.concatenate([getattr(d, f) for d in draws]) for f in ("priorities", "keys", "rows"))
    best = np.lexsort((keys, priorities))[:n]
    return Draw(priorities[best], keys[best], rows[best])


def choose(draws: Sequence[Draw], n: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The sample of all shards from each one's `Draw` of at least `n`.

    Returns:
        For each shard the rows that it gives, (m,) int64, and `order` (at most `n`,) int64: these rows' vectors, stacked
        shard after shard and taken in `order`, are the sample, the lowest priority first.
    """
    priorities, keys, rows = (np.concatenate([getattr(d, f) for d in draws]) for f in ("priorities", "keys", "rows"))
    best = np.lexsort((keys, priorities))[:n]
    shard = np.repeat(np.arange(len(draws)), [len(d.rows) for d in draws])[best]
    return [rows[best[shard == i]] for i in range(len(draws))], np.argsort(np.argsort(shard, kind="stable"))


def _mixed(keys: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): uint64 -> uint64 that look independent."""
    keys = keys + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
