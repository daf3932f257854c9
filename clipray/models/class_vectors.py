"""Texts about classes to class vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipray.analysis.prompts import PromptStyle
from clipray.analysis.zero_shot import class_vectors
from clipray.models.text_encoder import TextEncoder

TEXTS_AT_ONCE = 4_096


def class_vectors_of(
    style: PromptStyle, classes: Sequence[int], encoder: TextEncoder
) -> tuple[np.ndarray, np.ndarray, int]:
    """For k classes of a style: vectors (k, d) float32, numbers of texts (k,) int64, and how many texts were cut."""
    vectors, counts, cut = [np.zeros((0, encoder.model.embed_dim), np.float32)], [np.zeros(0, np.int64)], 0
    at_once = max(1, TEXTS_AT_ONCE // max(1, len(style.templates)))
    for start in range(0, len(classes), at_once):
        chunk = classes[start : start + at_once]
        texts = [style.texts(n, encoder.token_count, encoder.context_length) for n in chunk]
        x, truncated = encoder.encode([text for of_class in texts for text in of_class])
        counts.append(np.array([len(of_class) for of_class in texts], np.int64))
        vectors.append(class_vectors(x, counts[-1]))
        cut += int(truncated.sum())
    return np.concatenate(vectors), np.concatenate(counts), cut
