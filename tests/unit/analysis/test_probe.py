"""The linear probe against scikit-learn's own pipeline."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from clipray.analysis.probe import fit, split


def blobs(classes: int, n: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = np.arange(n) % classes
    return (rng.normal(size=(classes, 16))[codes] + 1.5 * rng.normal(size=(n, 16)) + 5).astype(np.float32), codes


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("c", [0.01, 10.0])
def test_probabilities_are_scikit_learns(classes: int, c: float) -> None:
    x, codes = blobs(classes)
    x[:, 3] = 2  # a column that says nothing
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1_000)).fit(x.astype(np.float64), codes)
    found = fit(x, codes, classes, c)
    assert found.converged
    assert found.vectors.shape == (classes, 16)
    assert np.abs(found.probabilities(x) - oracle.predict_proba(x.astype(np.float64))).max() <= 1e-4
    assert found.accuracy(x, codes) == pytest.approx(oracle.score(x.astype(np.float64), codes), abs=0.005)


def test_too_few_iterations_are_told() -> None:
    x, codes = blobs(7)
    assert not fit(x, codes, 7, 100.0, max_iter=2).converged


def test_rows_stay_in_their_split_when_others_come() -> None:
    numbers = np.random.default_rng(0).random(10_000)
    found = split(numbers, 0.2, 0.3)
    assert np.bincount(found) / 10_000 == pytest.approx([0.5, 0.2, 0.3], abs=0.02)
    assert np.array_equal(split(numbers[:100], 0.2, 0.3), found[:100])
