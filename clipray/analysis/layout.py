"""Layouts of vectors on a plane by UMAP, and how well a layout keeps neighbourhoods."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

NEIGHBOURS = 15  # of trustworthiness
LEAST_ROWS = 4  # that UMAP lays out on a plane


def fit_umap(
    x: np.ndarray, *, n_neighbors: int, min_dist: float, metric: str, random_state: int
) -> tuple[np.ndarray, Any]:
    """Lay out vectors by UMAP (McInnes et al. 2018, arXiv 1802.03426), in one thread, so that a seed gives one layout.

    Args:
        x: (m, d) float32, m > n_neighbors, m >= LEAST_ROWS.

    Returns:
        Places (m, 2) float32 of the vectors, and the fitted `umap.UMAP`.
    """
    from umap import UMAP

    # Without `disconnection_distance` a vector that is opposite to all others would have no place, and raise an error.
    model = UMAP(
        n_neighbors=n_neighbors, min_dist=min_dist, metric=metric, random_state=random_state,
        transform_seed=random_state, n_jobs=1, disconnection_distance=np.inf,
    )  # fmt: skip
    with _one_thread():
        return np.asarray(model.fit_transform(x), np.float32), model


def apply_umap(model: Any, x: np.ndarray) -> np.ndarray:
    """Places (n, 2) float32 of further vectors (n, d). The same vectors in one call get the same places, whatever came before.

    Args:
        model: a `umap.UMAP` that `fit_umap` has fitted.
    """
    with _one_thread():
        return np.asarray(model.transform(np.ascontiguousarray(x, np.float32)), np.float32)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Numba works in one thread, and UMAP does not say that small or scattered data is hard for it."""
    import numba

    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        numba.set_num_threads(before)


def trustworthiness(x: np.ndarray, places: np.ndarray, metric: str) -> float | None:
    """How far the `NEIGHBOURS` nearest on the plane are near in the space too, from 0 to 1 (Venna and Kaski 2001).

    Args:
        x: (m, d) vectors. places: (m, 2).

    Returns:
        None where there are too few vectors to tell: it takes more than twice `NEIGHBOURS`.
    """
    from sklearn.manifold import trustworthiness as of_layout

    if len(x) <= 2 * NEIGHBOURS:
        return None
    return float(of_layout(x, places, n_neighbors=NEIGHBOURS, metric=metric))
