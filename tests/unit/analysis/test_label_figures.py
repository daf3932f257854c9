"""Figures of labels against scikit-learn's, by hand, and their intervals against a bootstrap over the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score

from clipray.analysis import label_figures as lf

CLASSES = 12


def labelled(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Known classes (n,), scores (n, k) that are right more often than not, probabilities of the first label (n,)."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, CLASSES - 1, n)  # of the last class there are no rows
    scores = rng.normal(size=(n, CLASSES))
    scores[np.arange(n), truth] += rng.choice([0.5, 3.0], n)
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    return truth, scores, p.max(1).astype(np.float32)


def ranks_of(truth: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return (scores > scores[np.arange(len(truth)), truth][:, None]).sum(1)


def state_of(n: int, seed: int = 0) -> lf.Outcomes:
    truth, scores, p = labelled(n, seed)
    return lf.count(truth, ranks_of(truth, scores), p, CLASSES)


def test_accuracies_are_scikit_learns() -> None:
    truth, scores, _ = labelled(4_000)
    found = lf.figures(state_of(4_000))
    for top in lf.TOPS:
        expected = top_k_accuracy_score(truth, scores, k=top, labels=range(CLASSES))
        assert found[f"top{top}"] == pytest.approx(expected, abs=1e-12)
    assert found["mean_per_class"] == pytest.approx(balanced_accuracy_score(truth, scores.argmax(1)), abs=1e-12)


def test_calibration_error_by_its_definition_and_by_hand() -> None:
    truth, scores, p = labelled(4_000)
    right, bins = scores.argmax(1) == truth, np.minimum((p * 15).astype(int), 14)
    expected = sum(abs(right[bins == b].mean() - p[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins))
    assert lf.figures(state_of(4_000))["ece"] == pytest.approx(expected, abs=1e-6)
    p, ranks = np.array([0.9, 0.9, 0.5, 1.0], np.float32), np.array([0, 4, 0, 0])
    found = lf.figures(lf.count(np.zeros(4, int), ranks, p, 1))
    assert found["ece"] == pytest.approx((abs(1.8 - 1) + abs(0.5 - 1) + 0) / 4)
    assert (found["top1"], found["top3"], found["top5"]) == (0.75, 0.75, 1.0)


def test_any_split_of_the_rows_gives_the_same_state() -> None:
    truth, scores, p = labelled(1_000)
    ranks = ranks_of(truth, scores)
    parts = [
        lf.count(truth[i], ranks[i], p[i], CLASSES)
        for i in np.array_split(np.random.default_rng(1).permutation(1_000), 7)
    ]
    merged = lf.empty(CLASSES)
    for part in parts:
        merged = lf.combine(part, merged)
    whole = state_of(1_000)
    assert np.array_equal(merged.ranks, whole.ranks)
    assert np.array_equal(merged.calibration, whole.calibration)
    assert np.allclose(merged.confidence, whole.confidence)


def test_intervals_are_those_of_a_bootstrap_over_rows() -> None:
    truth, scores, p = labelled(800)
    ranks, rng = ranks_of(truth, scores), np.random.default_rng(3)
    samples = [rng.integers(0, 800, 800) for _ in range(2_000)]
    rows = {
        "top1": [(ranks[s] == 0).mean() for s in samples],
        "top3": [(ranks[s] < 3).mean() for s in samples],
        "mean_per_class": [balanced_accuracy_score(truth[s], scores[s].argmax(1)) for s in samples[:500]],
        "ece": [lf.figures(lf.count(truth[s], ranks[s], p[s], CLASSES))["ece"] for s in samples[:500]],
    }
    drawn = lf.bootstrap(state_of(800), 4_000, 0)
    for name, values in rows.items():
        for ours, theirs in zip(lf.interval(drawn[name], 0.9), np.quantile(values, [0.05, 0.95]), strict=True):
            assert ours == pytest.approx(theirs, abs=0.006), name
    again = lf.bootstrap(state_of(800), 4_000, 0)
    assert all(np.array_equal(drawn[name], again[name]) for name in drawn)


def test_paired_differences_are_narrower_than_unpaired_ones() -> None:
    """Two labellings that mostly agree: what they share cancels."""
    truth, scores, _ = labelled(2_000)
    a = ranks_of(truth, scores)
    b = ranks_of(truth, scores + np.random.default_rng(5).normal(size=scores.shape) * 0.2)
    cells = lf.joint_cells(truth, a, b, CLASSES)
    drawn = lf.paired_differences(cells, 2_000, 0)
    rng = np.random.default_rng(7)
    expected = [((a[s] == 0).mean() - (b[s] == 0).mean()) for s in rng.integers(0, 2_000, (2_000, 2_000))]
    low, high = lf.interval(drawn["top1"], 0.95)
    assert (low, high) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])), abs=0.003)
    p = np.full(2_000, 0.5, np.float32)
    ours, theirs = (lf.count(truth, r, p, CLASSES) for r in (a, b))
    apart = lf.differences(lf.bootstrap(ours, 2_000, 0), lf.bootstrap(theirs, 2_000, 1))
    wide = lf.interval(apart["top1"], 0.95)
    assert high - low < 0.6 * (wide[1] - wide[0])
    assert accuracy_score(truth, scores.argmax(1)) == pytest.approx((a == 0).mean())


def test_many_classes_are_drawn_in_parts() -> None:
    """More cells than are drawn at a time."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 60_000, 3_000)
    state = lf.count(truth, np.where(rng.random(3_000) < 0.7, 0, lf.MISS), np.full(3_000, 0.7, np.float32), 60_000)
    drawn = lf.bootstrap(state, 100, 0)
    assert {len(values) for values in drawn.values()} == {100}
    assert drawn["top1"].mean() == pytest.approx(0.7, abs=0.02)
