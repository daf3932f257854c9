"""Random rows of a table that lies in shards: the same rows whatever the split.

Each row has a key of its own, say a hash of its id, from which and from `random_state` its priority is computed; the
lowest priorities are drawn. So a shard offers its best candidates, and the best of these are the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Draw:
    """A shard's candidates, the lowest priority first.

    Attributes:
        priorities: (m,) float64, finite.
        keys: (m,) uint64.
        rows: (m,) int64, within the shard.
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
