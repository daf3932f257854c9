"""Linear probes: multinomial logistic regression on frozen vectors, by L-BFGS (arXiv 2103.00020, section 3.2)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Logits are x @ vectors.T + intercepts; probabilities their softmax.

    Attributes:
        vectors: (k, d) float64. intercepts: (k,) float64. The scaling of training is in both.
        converged: whether L-BFGS came to rest before its last iteration.
    """

    vectors: np.ndarray
    intercepts: np.ndarray
    converged: bool = True

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """(n, k) float64 of vectors (n, d)."""
        from scipy.special import softmax

        return softmax(x.astype(np.float64) @ self.vectors.T + self.intercepts, axis=1)

    def accuracy(self, x: np.ndarray, codes: np.ndarray) -> float:
        """The share of rows whose most probable class is theirs, codes (n,)."""
        return float((self.probabilities(x).argmax(axis=1) == codes).mean())


def fit(x: np.ndarray, codes: np.ndarray, n_classes: int, c: float, max_iter: int = 1_000) -> LinearProbe:
    """Train on vectors (n, d) of classes (n,), each of `n_classes` being there, at least two.

    Columns are brought to mean 0 and variance 1 first, so that one C means the same for any vectors.

    Args:
        c: the inverse of the strength of the L2 penalty, scikit-learn's C.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x = x.astype(np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale < 1e-12 * max(1.0, float(np.abs(mean).max()))] = 1
    model = LogisticRegression(C=c, solver="lbfgs", max_iter=max_iter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit((x - mean) / scale, codes)
    vectors, intercepts = model.coef_ / scale, model.intercept_
    if n_classes == 2:  # scikit-learn keeps one row, whose sigmoid is the softmax of it and of nothing
        vectors, intercepts = np.vstack([np.zeros_like(vectors), vectors]), np.concatenate([[0.0], intercepts])
    return LinearProbe(vectors, intercepts - vectors @ mean, not any(w.category is ConvergenceWarning for w in caught))


def split(fractions: np.ndarray, validation: float, test: float) -> np.ndarray:
    """(n,) int8 into SPLITS, by a number from [0, 1) that belongs to each row."""
    return np.where(fractions < test, 2, np.where(fractions < test + validation, 1, 0)).astype(np.int8)
