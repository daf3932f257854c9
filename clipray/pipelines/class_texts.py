"""Texts about classes to class vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from clipray.analysis.prompts import PromptStyle
from clipray.analysis.zero_shot import class_vectors
from clipray.models.text_encoder import TextEncoder
from clipray.pipelines.spec import ClassTexts, EncodedClasses

TEXTS_AT_ONCE = 4_096


def encode_classes(work: ClassTexts) -> EncodedClasses:
    """Load the text tower and encode; for a process of its own, whose torch gets `threads`."""
    torch.set_num_threads(work.threads)
    encoder = TextEncoder(work.model, precision=work.precision, batch_size=64)
    parts, cut = [], 0
    for style, start, stop in work.ranges:
        vectors, counts, truncated = class_vectors_of(style, range(start, stop), encoder)
        parts.append((vectors, counts))
        cut += truncated
    facts = {"logit_scale": encoder.logit_scale, "logit_bias": encoder.logit_bias, "prompts_truncated": cut}
    return EncodedClasses(parts, {**facts, "text_precision": encoder.precision})


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
