"""Captions and image vectors to scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from clipray.analysis.caption_scores import clip_score, ref_clip_score, reference_score
from clipray.analysis.normalize import l2_normalize
from clipray.models.text_encoder import Tokens
from clipray.pipelines.block_encoder import Row
from clipray.pipelines.spec import CaptionSpec
from clipray.pipelines.text import TokenBlockEncoder, rejection
from clipray.tables.reasons import Rejected

VectorAndTokens = tuple[np.ndarray, Tokens]


class CaptionBlockEncoder(TokenBlockEncoder[CaptionSpec, VectorAndTokens]):
    """Rows with `image_id`, `caption`, perhaps `references`, and the image's vector -> rows of `caption_scores`."""

    def load(self, block: pa.Table) -> Iterator[VectorAndTokens | Rejected]:
        """The image's vector and the tokens of the caption and its references; null and empty references are skipped."""
        images = block[self.spec.image_vectors].combine_chunks()
        captions, ids, x = block["caption"].to_pylist(), block["image_id"].to_pylist(), _matrix(images)
        has_references = "references" in block.column_names
        references = block["references"].to_pylist() if has_references else [None] * len(block)
        texts = [
            self._no_image(image_id, vector if valid else None)
            or rejection(caption, "caption")
            or [caption, *(text for text in others or () if rejection(text, "reference") is None)]
            for image_id, valid, vector, caption, others in zip(
                ids, images.is_valid().to_pylist(), x, captions, references, strict=True
            )
        ]
        prefixed = [row if isinstance(row, Rejected) else [self.spec.prefix + text for text in row] for row in texts]
        for vector, tokens in zip(x, self.tokenize(prefixed), strict=True):
            yield tokens if isinstance(tokens, Rejected) else (vector, tokens)

    def encode(self, items: Sequence[VectorAndTokens]) -> list[Row | Rejected]:
        vectors = self.vectors([tokens for _, tokens in items])  # (1 + r, d) each: the caption, its references
        captions, counts = np.stack([x[0] for x in vectors]), np.array([len(x) - 1 for x in vectors])
        score = clip_score(captions, l2_normalize(np.stack([image for image, _ in items])))
        with_references = ref_clip_score(
            score, reference_score(captions, np.concatenate([x[1:] for x in vectors]), counts)
        )
        return [
            Row(
                {
                    "clipscore": score[n],
                    "ref_clipscore": with_references[n] if counts[n] else None,
                    "truncated": bool(tokens.cut[0]),
                }
            )
            if np.isfinite(vectors[n]).all()
            else Rejected("encode", "encode_failed", "the vector is not finite")
            for n, (_, tokens) in enumerate(items)
        ]

    def _no_image(self, image_id: str | None, vector: np.ndarray | None) -> Rejected | None:
        if image_id is None:
            return Rejected("manifest", "no_source", "no `image_id`")
        if vector is None:
            return Rejected("manifest", "no_such_image", f"{self.spec.source} has no image {image_id!r}")
        if not np.isfinite(vector).all():
            message = f"the vector of {image_id!r} in {self.spec.source} is not finite"
            return Rejected("encode", "encode_failed", message)
        return None


def _matrix(vectors: pa.FixedSizeListArray) -> np.ndarray:
    """(n, d) float32; anything where the vector is null."""
    width = vectors.type.list_size
    values = vectors.values.slice(vectors.offset * width, len(vectors) * width)
    return values.to_numpy(zero_copy_only=False).reshape(-1, width)
