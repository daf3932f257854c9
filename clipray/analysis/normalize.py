"""Lengths of vectors: L2 normalisation, of NumPy rows and of tensors, and rows too long for float32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

SHORTEST = 1e-12  # of a vector whose square has lost no digits in float32
LONGEST = 4e18  # of a vector: squared distances of two such ones are below the largest float32


def l2_normalize(x: np.ndarray) -> np.ndarray:
    """(n, d) float16, float32 or float64 -> (n, d) float32 of unit length; zero vectors stay zero, infinite ones become NaN.

    Float64 is normalised as such and rounded at the end. Lengths that cannot be squared are computed in float64.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        y: np.ndarray = x.astype(np.float64 if x.dtype == np.float64 else np.float32)
        lengths = np.linalg.norm(y, axis=1, keepdims=True)  # (n, 1)
        y /= np.maximum(lengths, SHORTEST)
        odd = np.flatnonzero(~((lengths > SHORTEST) & (lengths < np.inf)))
        if len(odd):
            exact = x[odd].astype(np.float64)
            exact /= np.maximum(np.abs(exact).max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
            y[odd] = exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), SHORTEST)
    return y.astype(np.float32, copy=False)


def l2_normalize_tensor(x: Tensor, dim: int = -1) -> Tensor:
    """`x` in float32 with unit length along `dim`; zero vectors stay zero."""
    x = x.float()
    return x / x.norm(dim=dim, keepdim=True).clamp_min(SHORTEST)


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
