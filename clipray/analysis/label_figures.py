"""Accuracy and calibration of labels, with confidence intervals, from counts that merge in any order.

The bootstrap (Efron 1979) draws n rows with replacement. A figure that depends on counts alone needs no rows for that: the
counts of such a draw are multinomial with the counts found, so it costs the same for a thousand rows and for a billion.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

TOPS = (1, 3, 5)
BINS = 15  # of the calibration, equally wide (Guo et al. 2017, arXiv 1706.04599)
FINE = 100  # parts of a bin, within which the bootstrap takes probabilities for equal
MISS = 127  # the rank of a label that is not among those given; ranks from 126 on count as one
DRAWN_VALUES = 2**22  # that are drawn at a time


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What is counted of labelled rows.

    Attributes:
        ranks: (k, 4) int64, rows by true class and by the place of that class among the labels: 1st, 2nd or 3rd, 4th or
            5th, further back.
        calibration: (BINS * FINE, 2) int64, rows by probability of the first label, and by whether it is right.
        confidence: likewise the sum of these probabilities, float64.
    """

    ranks: np.ndarray
    calibration: np.ndarray
    confidence: np.ndarray

    @property
    def n(self) -> int:
        return int(self.ranks.sum())


def empty(n_classes: int) -> Outcomes:
    """The state of no rows."""
    size = (BINS * FINE, 2)
    return Outcomes(np.zeros((n_classes, len(TOPS) + 1), np.int64), np.zeros(size, np.int64), np.zeros(size))


def count(truth: np.ndarray, ranks: np.ndarray, probabilities: np.ndarray, n_classes: int) -> Outcomes:
    """The state of some rows.

    Args:
        truth: (n,) numbers of the true classes. ranks: (n,) place of the true class among the labels, from 0, or MISS.
        probabilities: (n,) of the first label.
    """
    levels = len(TOPS) + 1
    by_rank = np.bincount(truth.astype(np.int64) * levels + level(ranks), minlength=n_classes * levels)
    fine = np.minimum((probabilities.astype(np.float64) * (BINS * FINE)).astype(np.int64), BINS * FINE - 1)
    place, size = 2 * fine + (ranks == 0), 2 * BINS * FINE
    calibration = np.bincount(place, minlength=size).reshape(-1, 2)
    confidence = np.bincount(place, probabilities, minlength=size).reshape(-1, 2)
    return Outcomes(by_rank.reshape(n_classes, levels), calibration, confidence)


def combine(a: Outcomes, b: Outcomes) -> Outcomes:
    """The state of both."""
    return Outcomes(a.ranks + b.ranks, a.calibration + b.calibration, a.confidence + b.confidence)


def level(ranks: np.ndarray) -> np.ndarray:
    """(n,) int64 columns of `Outcomes.ranks`."""
    return np.searchsorted(TOPS, ranks, side="right").astype(np.int64)


def accuracies(cells: np.ndarray) -> dict[str, np.ndarray]:
    """`top1`, `top3`, `top5` and `mean_per_class` of (…, k, 4) counts; the last over classes that have rows."""
    totals = cells.sum(axis=(-2, -1))
    right = np.cumsum(cells.sum(axis=-2), axis=-1)
    top_accuracies = {f"top{top}": right[..., n] / totals for n, top in enumerate(TOPS)}
    rows = cells.sum(axis=-1)
    shares = cells[..., 0] / np.maximum(rows, 1)
    return {**top_accuracies, "mean_per_class": shares.sum(-1) / (rows > 0).sum(-1)}


def calibration_error(counts: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Expected calibration error of (…, BINS * FINE, 2) counts and sums of probabilities: mean |probability - accuracy|."""
    shape = (*counts.shape[:-2], BINS, FINE)
    right = counts[..., 1].reshape(shape).sum(-1)
    confidences = confidence.sum(-1).reshape(shape).sum(-1)
    return np.abs(confidences - right).sum(-1) / counts.sum(axis=(-2, -1))


def figures(state: Outcomes) -> dict[str, float]:
    """All figures of a state that has rows."""
    values = {name: float(value) for name, value in accuracies(state.ranks).items()}
    return {**values, "ece": float(calibration_error(state.calibration, state.confidence))}


def bootstrap(state: Outcomes, n: int, random_state: int) -> dict[str, np.ndarray]:
    """(n,) float64 values of each figure, of as many bootstrap samples."""
    rng = np.random.default_rng(random_state)
    drawn = _stacked(accuracies(cells) for cells in _draws(state.ranks, n, rng))
    mean = state.confidence / np.maximum(state.calibration, 1)
    errors = [calibration_error(counts, counts * mean) for counts in _draws(state.calibration, n, rng)]
    return {**drawn, "ece": np.concatenate(errors)}


def joint_cells(truth: np.ndarray, a: np.ndarray, b: np.ndarray, n_classes: int) -> np.ndarray:
    """(k, 4, 4) int64: rows by true class and by what each of two labellings did with them, as ranks (n,)."""
    levels = len(TOPS) + 1
    place = (truth.astype(np.int64) * levels + level(a)) * levels + level(b)
    return np.bincount(place, minlength=n_classes * levels**2).reshape(n_classes, levels, levels)


def paired_differences(cells: np.ndarray, n: int, random_state: int) -> dict[str, np.ndarray]:
    """(n,) bootstrap values of a's accuracies less b's over the same rows. cells: of `joint_cells`."""
    draws = _draws(cells, n, np.random.default_rng(random_state))
    return _stacked(differences(accuracies(c.sum(axis=-1)), accuracies(c.sum(axis=-2))) for c in draws)


def _stacked(draws: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The figures of all draws, by name."""
    first, *others = draws
    return {name: np.concatenate([values, *(other[name] for other in others)]) for name, values in first.items()}


def interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """The percentile interval of bootstrap values."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def differences(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Figures of one labelling less those of another, of the metrics that both have."""
    return {name: a[name] - b[name] for name in a if name in b}


def _draws(cells: np.ndarray, n: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Counts of `n` bootstrap samples, (m, *cells.shape) at a time."""
    flat = cells.ravel()
    there = np.flatnonzero(flat)
    total = int(flat.sum())
    at_once = max(1, DRAWN_VALUES // flat.size)
    for start in range(0, n, at_once):
        m = min(at_once, n - start)
        drawn = np.zeros((m, flat.size), np.int64)
        drawn[:, there] = rng.multinomial(total, flat[there] / total, size=m)
        yield drawn.reshape(m, *cells.shape)
