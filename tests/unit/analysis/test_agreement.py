"""Agreement of clusters and labels, held against scikit-learn's over the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from clipray.analysis.agreement import agreement

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 7, 2_000)
CASES = {
    "unrelated": (LABELS, RNG.integers(0, 9, 2_000)),
    "nearly equal": (LABELS, np.where(RNG.random(2_000) < 0.9, LABELS, 0)),
    "equal": (LABELS, LABELS[::1] * 3),
    "one cluster": (LABELS, np.zeros(2_000, int)),
    "one label": (np.zeros(2_000, int), LABELS),
    "one of both": (np.zeros(5, int), np.zeros(5, int)),
    "each apart": (np.arange(9), np.arange(9)),
    "apart and together": (np.arange(9), np.zeros(9, int)),
    "one row": (np.zeros(1, int), np.zeros(1, int)),
}


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_scikit_learn(name: str) -> None:
    labels, clusters = CASES[name]
    counts = sparse.coo_matrix((np.ones(len(labels), np.int64), (labels, clusters)))
    dense = contingency_matrix(labels, clusters)
    scores = agreement(counts)
    assert scores["purity"] == pytest.approx(dense.max(axis=0).sum() / dense.sum(), abs=1e-12)
    assert scores["nmi"] == pytest.approx(normalized_mutual_info_score(labels, clusters), abs=1e-9)
    assert scores["ari"] == pytest.approx(adjusted_rand_score(labels, clusters), abs=1e-9)
