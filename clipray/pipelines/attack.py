"""Labelled images to the labels that a network gives them, before and after a wrong label is written on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from clipray.job import Lettering
from clipray.models.image_encoder import ImageEncoder
from clipray.models.preprocess import Preprocess
from clipray.pipelines.block_encoder import BlockEncoder, Row
from clipray.pipelines.decode import DecodedImage
from clipray.pipelines.image_loader import ImageLoader
from clipray.pipelines.spec import AttackSpec, Report
from clipray.tables.reasons import Rejected

MARGIN = 0.25  # of the letters' size, around the word
PLACES = {
    "centre": (0.5, 0.5), "top": (0.0, 0.5), "bottom": (1.0, 0.5), "left": (0.5, 0.0), "right": (0.5, 1.0),
    "top_left": (0.0, 0.0), "top_right": (0.0, 1.0), "bottom_left": (1.0, 0.0), "bottom_right": (1.0, 1.0),
}  # fmt: skip
"""The share of the free room that lies above the plate, and the share to its left."""

ImageAndWord = tuple[DecodedImage, str]


class AttackBlockEncoder(BlockEncoder[AttackSpec, ImageEncoder, ImageAndWord]):
    """Manifest rows -> rows of `attacks`. An image is decoded once and preprocessed twice, in the decoding threads."""

    inputs_per_row = 2

    def __init__(self, spec: AttackSpec, report: Report) -> None:
        super().__init__(spec, report, ImageEncoder)
        self._classifier = spec.classifier()
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


def wrong_label(image_id: str, label: int, n_labels: int, seed: int) -> int:
    """A label that is not the image's own; every other one is equally likely."""
    other = int(_fraction(image_id, seed, "word") * (n_labels - 1))
    return other + (other >= label)


def place_of(image_id: str, lettering: Lettering, seed: int) -> tuple[float, float]:
    """The share of the free room above the word, and the share to its left, each in [0, 1]."""
    if lettering.place != "random":
        return PLACES[lettering.place]
    return _fraction(image_id, seed, "top"), _fraction(image_id, seed, "left")


def _fraction(image_id: str, seed: int, what: str) -> float:
    """A number in [0, 1) drawn by image and seed."""
    digest = hashlib.sha256(f"{seed}\0{what}\0{image_id}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def write_word(image: Image.Image, word: str, place: tuple[float, float], lettering: Lettering) -> Image.Image:
    """A copy of an RGB image with a word on it.

    The word goes on one line if it fits, else on a line for each of its parts. Where neither fits, the layout with the
    larger letters is taken.
    """
    height, width = image.height, image.width
    font_px = max(1.0, lettering.size * min(height, width))
    plates = [_Plate(text, font_px) for text in (word, "\n".join(word.split()))]
    roomiest = max(plates, key=lambda plate: plate.fit(height, width))
    plate = next((plate for plate in plates if plate.fit(height, width) >= 1), roomiest)
    while plate.fit(height, width) < 1 < plate.font_px:  # letters do not scale quite evenly
        plate = _Plate(plate.text, max(1.0, min(0.98, plate.fit(height, width)) * plate.font_px))
    top, left = max(0, height - plate.height) * place[0], max(0, width - plate.width) * place[1]
    result = image.copy()
    pen = ImageDraw.Draw(result)
    if lettering.plate is not None:
        pen.rectangle((left, top, left + plate.width - 1, top + plate.height - 1), fill=lettering.plate)
    plate.write(pen, top, left, lettering.colour)
    return result


class _Plate:
    """A text with a margin around it, `height` and `width` in px."""

    def __init__(self, text: str, font_px: float) -> None:
        self.text, self.font_px, self._font = text, font_px, ImageFont.load_default(font_px)
        pen = ImageDraw.Draw(Image.new("L", (1, 1)))
        left, top, right, bottom = pen.multiline_textbbox((0, 0), text, font=self._font, align="center")  # of the ink
        margin = MARGIN * font_px
        self.height, self.width = bottom - top + 2 * margin, right - left + 2 * margin
        self._ink_at = margin - left, margin - top

    def fit(self, height: int, width: int) -> float:
        """The factor by which it could grow on an image of this size; below 1 it must shrink."""
        return min(height / self.height, width / self.width)

    def write(self, pen: ImageDraw.ImageDraw, top: float, left: float, colour: str) -> None:
        at = left + self._ink_at[0], top + self._ink_at[1]
        pen.multiline_text(at, self.text, fill=colour, font=self._font, align="center")
