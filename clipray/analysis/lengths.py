"""Which vectors are finite, and short enough for float32 to square their distances."""

from __future__ import annotations

import math

import numpy as np

LONGEST = 4e18  # of a vector: squared distances of two such ones are below the largest float32


def surely_usable(x: np.ndarray) -> bool:
    """Whether all rows of `x` (n, d) are finite and at most `LONGEST` long, told in one pass; False also where it cannot tell."""
    if x.dtype == np.float16:
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        return bool((np.einsum("ij,ij->i", x, x) <= LONGEST**2).all())


def first_long_rows(x: np.ndarray, limit: int = 5) -> np.ndarray:
    """Numbers of the first `limit` rows of finite `x` (n, d) that are longer than `LONGEST`, int64 ascending."""
    if x.dtype == np.float16 or not x.size or max(x.max(), -x.min()) <= LONGEST / math.sqrt(x.shape[1]):
        return np.zeros(0, np.int64)
    with np.errstate(over="ignore"):
        return np.flatnonzero(np.linalg.norm(x.astype(np.float64), axis=1) > LONGEST)[:limit]
