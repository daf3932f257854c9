"""Words written on images: which, where and how. Depends only on the image's id and the seed."""

from __future__ import annotations

import hashlib

from PIL import Image, ImageDraw, ImageFont

from clipray.job import Lettering

MARGIN = 0.25  # of the letters' size, around the word
PLACES = {
    "centre": (0.5, 0.5), "top": (0.0, 0.5), "bottom": (1.0, 0.5), "left": (0.5, 0.0), "right": (0.5, 1.0),
    "top_left": (0.0, 0.0), "top_right": (0.0, 1.0), "bottom_left": (1.0, 0.0), "bottom_right": (1.0, 1.0),
}  # fmt: skip
"""The share of the free room that lies above the plate, and the share to its left."""


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
