"""How well clusters agree with labels, from counts of both: no row is held."""

from __future__ import annotations

import numpy as np
from scipy import sparse


def agreement(counts: sparse.coo_matrix) -> dict[str, float]:
    """Purity, normalised mutual information and adjusted Rand index, as scikit-learn defines the last two.

    Args:
        counts: (l, k) rows by label and by cluster, one entry for each pair, the sum above 0.
    """
    from scipy.stats import entropy
    from sklearn.metrics import mutual_info_score

    n, counts = float(counts.sum()), counts.tocsr()
    labels, clusters = (np.asarray(counts.sum(axis=axis), np.float64).ravel() for axis in (1, 0))
    mean_entropy = (entropy(labels) + entropy(clusters)) / 2
    information = mutual_info_score(None, None, contingency=counts)
    return {
        "purity": float(counts.max(axis=0).sum()) / n,
        "nmi": float(information / mean_entropy) if mean_entropy > 0 else 1.0,
        "ari": _adjusted_rand(_pairs(counts.data), _pairs(labels), _pairs(clusters), _pairs(np.array([n]))),
    }


def _pairs(counts: np.ndarray) -> float:
    """Pairs of rows within the groups of these sizes."""
    sizes = counts.astype(np.float64)
    return float((sizes * (sizes - 1)).sum() / 2)


def _adjusted_rand(both: float, labels: float, clusters: float, total: float) -> float:
    """Hubert and Arabie 1985, from pairs with the same label and cluster, label, cluster, and all."""
    expected = labels * clusters / total if total else 0.0
    largest = (labels + clusters) / 2
    return (both - expected) / (largest - expected) if largest != expected else 1.0
