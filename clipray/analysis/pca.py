"""Principal components from moments, with whitening that does not blow up small ones.

`fit` needs the state of a table only (clipray.analysis.moments), `transform` one block at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clipray.analysis.moments import CHUNK_ROWS, Moments, checked

RANK_TOLERANCE = 1e-6  # of the largest variance: float32 products leave up to 1e-7 where there is none
FOLDED_MEAN = 100  # standard deviations: a product with a mean of so many keeps 1e-5 of one
SIGN_TOLERANCE = 1e-5  # coefficients as near as this to the largest tie with it


@dataclass(frozen=True, eq=False)
class Projection:
    """Principal components of vectors of d values, by falling variance.

    Attributes:
        mean: (d,) float64 of the vectors it was fitted on.
        components: (k, d) float64, rows orthonormal; the first of a row's largest coefficients is positive.
        variance: (k,) float64 along each component, divided by n_samples - 1, neither floored nor shrunk.
        explained_variance_ratio: (k,) float64, `variance` over the total variance of all d directions.
        scale: (k,) float64 that a component is multiplied with: ones, or what makes its variance 1.
    """

    mean: np.ndarray
    components: np.ndarray
    variance: np.ndarray
    explained_variance_ratio: np.ndarray
    scale: np.ndarray

    @property
    def n_components(self) -> int:
        return len(self.components)

    @property
    def n_features(self) -> int:
        return len(self.mean)

    def transform(self, x: np.ndarray) -> np.ndarray:
        """((x - mean) components^T) * scale, in float32 with a buffer of `CHUNK_ROWS` rows.

        Args:
            x: (n, d) float16, float32 or float64. A row with NaN or infinite values gives such a row.

        Returns:
            (n, k) float32.

        Raises:
            ValueError: another shape or dtype.
        """
        x = checked(x)
        if x.shape[1] != self.n_features:
            raise ValueError(f"x has {x.shape[1]} columns, the components were fitted on {self.n_features}")
        weights = self.components.T * self.scale  # (d, k)
        # A small mean is taken off after the product. A large one would cost the product its digits there: it is taken
        # off before, in float32 and a copy, and after the product only what its rounding left.
        folded = x.dtype == np.float32 and np.linalg.norm(self.mean) <= FOLDED_MEAN * np.sqrt(self.variance.min())
        shift = (0 * self.mean if folded else self.mean).astype(np.promote_types(x.dtype, np.float32))
        offset = ((self.mean - shift) @ weights).astype(np.float32)
        weights = weights.astype(np.float32)
        y = np.empty((min(len(x), CHUNK_ROWS), self.n_features), np.float32)
        z = np.empty((len(x), self.n_components), np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, len(x), CHUNK_ROWS):
                part, rows = x[start : start + CHUNK_ROWS], z[start : start + CHUNK_ROWS]
                shifted = part if folded else np.subtract(part, shift, out=y[: len(part)], casting="same_kind")
                np.matmul(shifted, weights, out=rows)  # (chunk, k)
                rows -= offset
        return z


def fit(
    moments: Moments,
    *,
    n_components: int | None = None,
    explained_variance: float | None = None,
    whiten: bool = False,
    epsilon: float = 1e-5,
    shrinkage: float = 0.0,
) -> Projection:
    """Eigenvectors of the covariance, as scikit-learn's PCA but for the signs.

    Whitening multiplies component i, of variance v_i, with

        scale_i = 1 / sqrt(max(s_i, epsilon * max_j s_j)),   s_i = (1 - shrinkage) * v_i + shrinkage * mean(v),

    max and mean over all d directions. So a component with less than `epsilon` of the largest variance is raised by
    1 / sqrt(epsilon * largest) and no more, and `shrinkage` is that of the covariance towards a multiple of the
    identity (Ledoit, Wolf 2004, with a given weight): 0 whitens fully, 1 scales all components alike.

    Components whose variances are equal are determined up to a rotation among themselves.

    Args:
        moments: of the vectors.
        n_components: how many, from 1 to min(n_features, n_samples - 1); or
        explained_variance: in (0, 1], for the fewest whose variances sum up to that share of the total.
        whiten: scale components to unit variance.
        epsilon: in [0, 1], `shrinkage` in [0, 1]: of whitening, see above.

    Raises:
        ValueError: settings out of range, both or neither count given, fewer than two vectors, values that are not
            finite, vectors that are all equal, more components than there can be, or than can be whitened.
    """
    _check_settings(n_components, explained_variance, epsilon, shrinkage)
    _check_moments(moments, n_components)
    values, vectors = np.linalg.eigh(moments.scatter / (moments.n_samples - 1))  # ascending
    variance, components = values[::-1].clip(min=0), vectors.T[::-1]
    rank = int((variance > RANK_TOLERANCE * variance[0]).sum())
    share = variance / variance.sum()
    if n_components is None:
        assert explained_variance is not None
        n_components = min(1 + int((share.cumsum() < explained_variance - 1e-12).sum()), rank)
    if whiten and n_components > rank:
        constant = len(moments.constant_columns)
        raise ValueError(
            f"n_components={n_components} should be <= {rank} to be whitened: {moments.n_samples} vectors of "
            f"{moments.n_features} values vary in {rank} directions"
            + (f" ({constant} columns are constant)" if constant else "")
        )
    shrunk = (1 - shrinkage) * variance + shrinkage * variance.mean()
    scale = 1 / np.sqrt(np.maximum(shrunk, epsilon * shrunk[0])[:n_components]) if whiten else np.ones(n_components)
    kept = _signed(components[:n_components])
    return Projection(moments.mean, kept, variance[:n_components], share[:n_components], scale)


def _check_settings(
    n_components: int | None, explained_variance: float | None, epsilon: float, shrinkage: float
) -> None:
    if (n_components is None) == (explained_variance is None):
        count = "neither" if n_components is None else "both"
        raise ValueError(f"expected one of n_components and explained_variance, found {count}")
    if n_components is not None and n_components < 1:
        raise ValueError(f"n_components={n_components} should be >= 1")
    if explained_variance is not None and not 0 < explained_variance <= 1:
        raise ValueError(f"explained_variance={explained_variance} should be in (0, 1]")
    for name, value in {"epsilon": epsilon, "shrinkage": shrinkage}.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} should be in [0, 1]")


def _check_moments(moments: Moments, n_components: int | None) -> None:
    n, d, bad = moments.n_samples, moments.n_features, moments.bad_columns
    if n < 2:
        raise ValueError(f"n_samples={n} should be >= 2: principal components need vectors that differ")
    if len(bad):
        raise ValueError(f"vectors should be finite: NaN or infinite in {len(bad)} of {d} columns, first in {bad[0]}")
    if len(moments.constant_columns) == d:
        raise ValueError(f"all {n} vectors are equal: they have no principal components")
    if n_components is not None and n_components > d:
        raise ValueError(f"n_components={n_components} should be <= n_features={d}")
    if n_components is not None and n_components > n - 1:
        raise ValueError(
            f"n_components={n_components} should be <= {n - 1}: n_samples={n} vectors vary in at most {n - 1} "
            "directions around their mean"
        )


def _signed(components: np.ndarray) -> np.ndarray:
    """Rows (k, d) turned so that the first of their largest coefficients is positive.

    Which of two equal ones comes out larger is a matter of rounding, so a tie has a tolerance.
    """
    size = np.abs(components)
    first = (size >= (1 - SIGN_TOLERANCE) * size.max(axis=1, keepdims=True)).argmax(axis=1)
    return components * np.sign(components[np.arange(len(components)), first])[:, None]
