"""Which box of an image a caption means: similarities of boxes and captions, without what a box has with any caption."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Referred:
    """The box of each of m captions of one image.

    Attributes:
        best: (m,) int64, its place among the boxes; of equals the first.
        scores: (b, m) float32, similarities without the baseline. margin: (m,) float32, the best score less the next; NaN where
            there is a single box.
    """

    best: np.ndarray
    scores: np.ndarray
    margin: np.ndarray

    def rank(self, box: int, caption: int) -> int:
        """From 1: how many boxes score at least as high, itself included, so that a tie counts against it."""
        column = self.scores[:, caption]
        return int((column >= column[box]).sum())


def others(similarity: np.ndarray) -> np.ndarray:
    """Of each similarity of b boxes and m captions, the mean of the same box's to the other captions: (b, m) float32.

    Zeros where there is a single caption (FALIP, Zhuang et al. 2024, arXiv 2407.05578).
    """
    similarity = similarity.astype(np.float32)
    m = similarity.shape[1]
    if m < 2:
        return np.zeros_like(similarity)
    result: np.ndarray = (similarity.sum(axis=1, keepdims=True) - similarity) / (m - 1)
    return result


def refer(similarity: np.ndarray, baseline: np.ndarray | float = 0.0) -> Referred:
    """The best box for each caption.

    Args:
        similarity: (b, m) with b >= 1, cosines of boxes and captions of one image.
        baseline: what a box has with any caption, to be subtracted: (b, m), as `others` gives it, or (b, 1).
    """
    scores = similarity.astype(np.float32) - np.float32(baseline)
    best = scores.argmax(axis=0)
    if len(scores) < 2:
        return Referred(best, scores, np.full(scores.shape[1], np.nan, np.float32))
    top = np.partition(scores, -2, axis=0)[-2:]
    return Referred(best, scores, top[1] - top[0])
