"""How well clusters agree with labels, from counts of both: no row is held."""

from __future__ import annotations

import numpy as np
from scipy import sparse


def agreement(counts: sparse.coo_matrix) -> dict[str, float]:
    """Purity, normalised mutual information and adjusted Rand index (Hubert and Arabie 1985), as scikit-learn defines the
    last two.

    Args:
        counts: (l, k) rows by label and by cluster, one entry for each pair, the sum above 0.
    """
    from scipy.special import comb
    from scipy.stats import entropy
    from sklearn.metrics import mutual_info_score

    n, counts = float(counts.sum()), counts.tocsr()
    labels, clusters = (np.asarray(counts.sum(axis=axis), np.float64).ravel() for axis in (1, 0))
    mean_entropy = (entropy(labels) + entropy(clusters)) / 2
    information = mutual_info_score(None, None, contingency=counts)
    # Pairs of rows with the same label and cluster, label, cluster, and all.
    same, same_label, same_cluster, pairs = (comb(sizes, 2).sum() for sizes in (counts.data, labels, clusters, n))
    expected, largest = same_label * same_cluster / max(pairs, 1), (same_label + same_cluster) / 2
    return {
        "purity": float(counts.max(axis=0).sum()) / n,
        "nmi": float(information / mean_entropy) if mean_entropy > 0 else 1.0,
        "ari": float((same - expected) / (largest - expected)) if largest != expected else 1.0,
    }
