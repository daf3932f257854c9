"""What is said of classes to their vectors."""

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
    """Vectors (k, d) float32 of some classes of a style, their numbers of texts (k,), how many texts were cut."""
    vectors, counts, cut = [np.zeros((0, encoder.model.embed_dim), np.float32)], [np.zeros(0, np.int64)], 0
    at_once = max(1, TEXTS_AT_ONCE // max(1, len(style.templates)))
    for start in range(0, len(classes), at_once):
        some = classes[start : start + at_once]
        said = [style.texts(n, encoder.token_count, encoder.context_length) for n in some]
        x, truncated = encoder.encode([text for texts in said for text in texts])
        counts.append(np.array([len(texts) for texts in said], np.int64))
        vectors.append(class_vectors(x, counts[-1]))
        cut += int(truncated.sum())
    return np.concatenate(vectors), np.concatenate(counts), cut
