"""Count, mean and scatter of vectors as a state that merges in any order.

The state of a table is `reduce(combine, map(moments, blocks), empty(d))`, whatever the blocks and whatever the order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CHUNK_ROWS = 4096  # of one product: half as many cost 7 % more at 512 and 768 columns, twice as many gain nothing
PROBES = 256  # rows whose mean shifts a block
DTYPES = (np.float16, np.float32, np.float64)
UNDERFLOW = 1e-28  # sums of float32 squares below it have lost digits


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of `n_samples` vectors of d values.

    Attributes:
        n_samples: of the vectors.
        mean: (d,) float64, zeros of an empty state.
        scatter: (d, d) float64, symmetric: the sum of (x - mean)(x - mean)^T over the vectors x.
    """

    n_samples: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def n_features(self) -> int:
        return len(self.mean)

    @property
    def constant_columns(self) -> np.ndarray:
        """Numbers of the columns that hold one value only, int64 ascending: exact, not a matter of rounding."""
        return np.flatnonzero(self.scatter.diagonal() == 0)

    @property
    def bad_columns(self) -> np.ndarray:
        """Numbers of the columns with NaN or infinite values, int64 ascending; `first_bad_rows` names the rows."""
        return np.flatnonzero(~np.isfinite(self.scatter.diagonal()))


def empty(n_features: int) -> Moments:
    """The state of no vectors, neutral in `combine`."""
    return Moments(0, np.zeros(n_features), np.zeros((n_features, n_features)))


def moments(x: np.ndarray) -> Moments:
    """The state of one block, without a copy of it.

    Products are of float32 (float64 for float64 vectors, and where float32 would overflow or underflow) over chunks,
    summed up in float64. Before them the block is shifted to near its mean, so that large means cost no digits:
    variances err by 1e-7 of the largest one. NaN and infinite values give a state with `bad_columns`, without a warning.

    Args:
        x: (n, d) float16, float32 or float64; absolute values below 1e150.

    Raises:
        ValueError: another shape or dtype, or no columns.
    """
    x = checked(x)
    n, d = x.shape
    if n == 0:
        return empty(d)
    with np.errstate(invalid="ignore", over="ignore"):
        shift = _shift(x)
        total, scatter = np.zeros(d), np.zeros((d, d))
        y = np.empty((min(n, CHUNK_ROWS), d), shift.dtype)
        for start in range(0, n, CHUNK_ROWS):
            part = x[start : start + CHUNK_ROWS]
            shifted = np.subtract(part, shift, out=y[: len(part)])  # (chunk, d)
            # (d, d): of one buffer, so that NumPy takes the symmetric product, half the work.
            product = shifted.T @ shifted
            if _lost_digits(shifted, product.diagonal()):
                shifted = np.subtract(part, shift, dtype=np.float64)
                product = shifted.T @ shifted
            total += _sum(shifted)
            scatter += product
        off = total / math.sqrt(n)
        scatter -= np.outer(off, off)
        return Moments(n, shift + total / n, scatter)


def combine(a: Moments, b: Moments) -> Moments:
    """The state of both (Chan, Golub, LeVeque 1979); commutative and associative to rounding in float64. Raises ValueError:
    different numbers of columns."""
    if a.n_features != b.n_features:
        raise ValueError(f"cannot combine vectors of {a.n_features} and of {b.n_features} values")
    if a.n_samples == 0 or b.n_samples == 0:
        return a if b.n_samples == 0 else b
    n = a.n_samples + b.n_samples
    with np.errstate(invalid="ignore", over="ignore"):
        delta = b.mean - a.mean
        apart = delta * math.sqrt(a.n_samples / n * b.n_samples)
        scatter = np.outer(apart, apart)
        scatter += a.scatter
        scatter += b.scatter
        # Of a column that is constant in both, delta is 0 and the mean stays that very value.
        return Moments(n, a.mean + delta * (b.n_samples / n), scatter)


def first_bad_rows(x: np.ndarray, limit: int = 5) -> np.ndarray:
    """Numbers of the first `limit` rows of `x` (n, d) with a NaN or infinite value, int64 ascending; raises as `moments`."""
    x = checked(x)
    bad_rows: list[int] = []
    for start in range(0, len(x), CHUNK_ROWS):
        part = x[start : start + CHUNK_ROWS]
        # NumPy's `isfinite` of float16 takes ten times as long as a look at the exponent.
        bad = (part.view(np.uint16) & 0x7C00) == 0x7C00 if x.dtype == np.float16 else ~np.isfinite(part)  # (chunk, d)
        bad_rows += (start + np.flatnonzero(bad.any(axis=1))).tolist()
        if len(bad_rows) >= limit:
            break
    return np.array(bad_rows[:limit], dtype=np.int64)


def checked(x: np.ndarray) -> np.ndarray:
    """`x`, a block of vectors. Raises ValueError: another shape or dtype, or no columns."""
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x has shape {x.shape}, expected (n, d) with d >= 1")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}, expected float16, float32 or float64")
    return x


def _shift(x: np.ndarray) -> np.ndarray:
    """(d,) float32 or float64 near the mean: the mean of evenly spaced rows.

    It need not be exact. Rows that are a share f of all have a mean within sqrt(1 / f - 1) standard deviations of it,
    however they are ordered; as a rule within 1 / 16. As a mean of differences it is exact where a column is constant.
    """
    probes = x[:: -(-len(x) // PROBES)].astype(np.float64)
    shift = probes[0] + (probes - probes[0]).mean(axis=0)
    # Not rounded to float16's few digits: products of such differences would all be rounded in one direction.
    return shift.astype(np.promote_types(x.dtype, np.float32))


def _sum(shifted: np.ndarray) -> np.ndarray:
    """(chunk, d) -> (d,) float64. Few at a time: long sums of float16 values are rounded in one direction."""
    whole = len(shifted) // 64 * 64
    few = shifted[:whole].reshape(-1, 64, shifted.shape[1]).sum(axis=1)  # (chunk / 64, d)
    return few.sum(axis=0, dtype=np.float64) + shifted[whole:].sum(axis=0, dtype=np.float64)


def _lost_digits(shifted: np.ndarray, squares: np.ndarray) -> bool:
    """Whether float32 was too narrow for the squares of `shifted` (chunk, d): one overflowed, or vanished."""
    if shifted.dtype == np.float64:
        return False
    return not np.isfinite(squares).all() or bool(shifted[:, squares < UNDERFLOW].any())
