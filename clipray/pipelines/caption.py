"""Blocks of pictures' vectors and captions to blocks of scores."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from clipray.analysis.caption_scores import clip_score, ref_clip_score, reference_score
from clipray.analysis.normalize import l2_normalize
from clipray.pipelines.spec import PairSettings
from clipray.pipelines.text import TextWork, refusal
from clipray.tables.reasons import Rejected


class ScorePairs(TextWork[PairSettings]):
    """Rows with `image_id`, `caption`, perhaps `references`, and the picture's vector -> rows of `caption_scores`."""

    def _made(self, block: pa.Table) -> tuple[dict[str, pa.Array], list[Rejected | None]]:
        pictures = block[self.settings.pictures].combine_chunks()
        captions, images, x = block["caption"].to_pylist(), block["image_id"].to_pylist(), _matrix(pictures)
        refused = [
            self._no_picture(image, vector if there else None) or refusal(caption, "caption")
            for image, caption, there, vector in zip(images, captions, pictures.is_valid().to_pylist(), x, strict=True)
        ]
        good = [n for n, no in enumerate(refused) if no is None]
        references, counts = self._references(block, good)
        texts = [*(captions[n] for n in good), *references]
        found = self._encode([self.settings.prefix + text for text in texts], range(len(texts)))
        own, others = found.vectors[: len(good)], found.vectors[len(good) :]
        score = clip_score(own, l2_normalize(x[good]))
        both = ref_clip_score(score, reference_score(own, others, counts))
        for place, no in found.failed.items():
            owner = place if place < len(good) else int(np.repeat(np.arange(len(good)), counts)[place - len(good)])
            refused[good[owner]] = no
        return {
            "clipscore": _spread(score, good, len(block)),
            "ref_clipscore": _spread(both, good, len(block)),
            "truncated": _spread(found.cut[: len(good)], good, len(block)),
        }, refused

    def _no_picture(self, image: str | None, vector: np.ndarray | None) -> Rejected | None:
        if image is None:
            return Rejected("manifest", "no_source", "no `image_id`")
        if vector is None:
            return Rejected("manifest", "no_such_image", f"{self.settings.source} has no picture {image!r}")
        if not np.isfinite(vector).all():
            return Rejected(
                "encode", "encode_failed", f"the vector of {image!r} in {self.settings.source} is not finite"
            )
        return None

    def _references(self, block: pa.Table, rows: list[int]) -> tuple[list[str], np.ndarray]:
        """The references of `rows`, one after the other, and how many each has; null and empty ones are passed over."""
        if "references" not in block.column_names:
            return [], np.zeros(len(rows), np.int64)
        column = block["references"].to_pylist()
        found = [[text for text in column[n] or () if refusal(text, "reference") is None] for n in rows]
        return [text for texts in found for text in texts], np.array([len(texts) for texts in found], np.int64)


def _matrix(vectors: pa.FixedSizeListArray) -> np.ndarray:
    """(n, d) float32; anything where the vector is null."""
    width = vectors.type.list_size
    values = vectors.values.slice(vectors.offset * width, len(vectors) * width)
    return values.to_numpy(zero_copy_only=False).reshape(-1, width)


def _spread(values: np.ndarray, places: list[int], rows: int) -> pa.Array:
    """`values` at their places among `rows`; null elsewhere, and where not a number."""
    whole, mask = np.zeros(rows, values.dtype), np.ones(rows, bool)
    whole[places], mask[places] = values, np.isnan(values) if values.dtype.kind == "f" else False
    return pa.array(whole, mask=mask)
