"""How well captions fit their images: CLIPScore and RefCLIPScore (Hessel et al. 2021, arXiv 2104.08718)."""

from __future__ import annotations

import numpy as np

WEIGHT = 2.5


def clip_score(captions: np.ndarray, images: np.ndarray) -> np.ndarray:
    """`2.5 · max(cos(caption, image), 0)`.

    Args:
        captions, images: (n, d) float32 of unit length, row by row.

    Returns:
        (n,) float32 in [0, 2.5].
    """
    return WEIGHT * np.maximum(np.einsum("nd,nd->n", captions, images), 0)


def reference_score(captions: np.ndarray, references: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`max(max over a caption's references of cos(caption, reference), 0)`.

    Args:
        captions: (n, d) float32 of unit length.
        references: (m, d) float32 of unit length: those of the first caption, then of the second, …
        counts: (n,) int, how many each caption has; they add up to m.

    Returns:
        (n,) float32 in [0, 1]; NaN for a caption without references.
    """
    best = np.full(len(captions), np.nan, np.float32)
    has = np.flatnonzero(counts)
    if len(has):
        cosines = np.einsum("md,md->m", np.repeat(captions, counts, axis=0), references)
        starts = np.cumsum(counts)[has] - counts[has]
        best[has] = np.maximum(np.maximum.reduceat(cosines, starts), 0)
    return best


def ref_clip_score(clip: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Harmonic mean of `clip_score` and `reference_score`, (n,) float32; 0 where both are 0, NaN without references."""
    together = clip + reference
    return np.where(together == 0, 0, 2 * clip * reference / np.where(together == 0, 1, together)).astype(np.float32)
