"""Which box of a picture a caption means: similarities of boxes and captions, without what a box has with any caption."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Referred:
    """The box of each of m captions of one picture.

    Attributes:
        best: (m,) int64, its place among the boxes; of equals the first.
        scores: (b, m) float32, as `scores` gives them. margin: (m,) float32, the best score less the next; NaN where
            there is a single box.
    """

    best: np.ndarray
    scores: np.ndarray
    margin: np.ndarray

    def rank(self, box: int, caption: int) -> int:
        """From 1: how many boxes score at least as high, itself included, so that a tie counts against it."""
        column = self.scores[:, caption]
        return int((column >= column[box]).sum())


def scores(similarity: np.ndarray, *, subtract: bool) -> np.ndarray:
    """Scores of b boxes and m captions of a picture, (b, m) float32 (FALIP, Zhuang et al. 2024, arXiv 2407.05578).

    Args:
        similarity: (b, m), cosines.
        subtract: from each the mean of the same box's similarities to the other captions, where there are any.
    """
    similarity = similarity.astype(np.float32)
    m = similarity.shape[1]
    if not subtract or m < 2:
        return similarity
    others = (similarity.sum(axis=1, keepdims=True) - similarity) / (m - 1)
    result: np.ndarray = similarity - others
    return result


def refer(similarity: np.ndarray, *, subtract: bool) -> Referred:
    """The best box for each caption; `similarity` (b, m) with b >= 1."""
    found = scores(similarity, subtract=subtract)
    best = found.argmax(axis=0)
    if len(found) < 2:
        return Referred(best, found, np.full(found.shape[1], np.nan, np.float32))
    top = np.partition(found, -2, axis=0)[-2:]
    return Referred(best, found, top[1] - top[0])
