"""Texts about classes to class vectors, in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clipray.models.class_vectors import class_vectors_of
from clipray.models.text_encoder import TextEncoder
from clipray.pipelines.spec import ClassTexts


@dataclass(frozen=True)
class EncodedClasses:
    """For each range the class vectors (k, d) float32 and the numbers of texts (k,) int64; and facts about the tower."""

    parts: list[tuple[np.ndarray, np.ndarray]]
    facts: dict[str, Any]


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
