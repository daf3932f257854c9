"""Labelled images to the labels that a network gives them, before and after a wrong label is written on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from clipray.analysis.zero_shot import ZeroShot
from clipray.models.image_encoder import ImageEncoder
from clipray.models.preprocess import Preprocess
from clipray.pipelines.block_encoder import BlockEncoder, Row
from clipray.pipelines.decode import DecodedImage
from clipray.pipelines.image_loader import ImageLoader
from clipray.pipelines.spec import AttackSpec, Report
from clipray.pipelines.typography import place_of, write_word, wrong_label
from clipray.tables.reasons import Rejected

ImageAndWord = tuple[DecodedImage, str]


class AttackBlockEncoder(BlockEncoder[AttackSpec, ImageEncoder, ImageAndWord]):
    """Manifest rows -> rows of `attacks`. An image is decoded once and preprocessed twice, in the decoding threads."""

    inputs_per_row = 2

    def __init__(self, spec: AttackSpec, report: Report) -> None:
        super().__init__(spec, report, ImageEncoder)
        classes = spec.classes()
        self._classifier = ZeroShot(classes.vectors, classes.logit_scale, top=1, precision="fp32")
        self._number = {label: n for n, label in enumerate(spec.labels)}
        self._loader = ImageLoader(spec)

    def load(self, block: pa.Table) -> Iterator[ImageAndWord | Rejected]:
        ids, labels = block["image_id"].to_pylist(), block["label"].to_pylist()
        words = [self._word(image_id, label) for image_id, label in zip(ids, labels, strict=True)]
        rejected = [Rejected("manifest", "no_label", "no `label`") if word is None else None for word in words]
        ways = (self._before_and_after(image_id, word or "") for image_id, word in zip(ids, words, strict=True))
        for image, word in zip(self._loader.load(block, self.ahead, ways, rejected), words, strict=True):
            yield image if isinstance(image, Rejected) else (image, word or "")

    def _word(self, image_id: str, label: str | None) -> str | None:
        if label is None or self.spec.own_label:
            return label
        return self.spec.labels[wrong_label(image_id, self._number[label], len(self.spec.labels), self.spec.seed)]

    def _before_and_after(self, image_id: str, word: str) -> Preprocess:
        lettering = self.spec.lettering
        place = place_of(image_id, lettering, self.spec.seed)
        return self._loader.both(partial(write_word, word=word, place=place, lettering=lettering))

    def encode(self, items: Sequence[ImageAndWord]) -> list[Row | Rejected]:
        pixels = np.concatenate([image.pixels for image, _ in items])  # (2 n, H, W, 3): before, after, before, …
        vectors = self.encoder.encode(pixels).vectors["clip"]
        top = self._classifier.label(vectors)
        finite = np.isfinite(vectors).reshape(len(items), -1).all(axis=1)
        labels = [self.spec.labels[n] for n in top.classes[:, 0].tolist()]
        probabilities = top.probabilities[:, 0].tolist()
        return [
            Row(
                {
                    "height": image.height,
                    "width": image.width,
                    "word": word,
                    "before": labels[2 * n],
                    "before_probability": probabilities[2 * n],
                    "after": labels[2 * n + 1],
                    "after_probability": probabilities[2 * n + 1],
                }
            )
            if finite[n]
            else Rejected("encode", "encode_failed", "the vector is not finite")
            for n, (image, word) in enumerate(items)
        ]
