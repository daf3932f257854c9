"""How a decoded image becomes the network's input, and what memory that takes beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

MAX_PIXELS = 100_000_000  # of one image, where nothing else is asked for
RGB_BYTES = 4  # of a pixel, as Pillow stores it


@dataclass(frozen=True)
class Preprocess:
    """Callable with the image and its original's height and width, which are the image's own unless it was decoded smaller.

    Attributes:
        to_pixels: (image, height, width of its original in px) -> (…, H, W, 3) uint8.
        scratch_bytes: (height, width of an image in px) -> what it takes beside the image.
    """

    to_pixels: Callable[[Image.Image, int, int], np.ndarray]
    scratch_bytes: Callable[[int, int], int]

    def __call__(self, image: Image.Image, height: int | None = None, width: int | None = None) -> np.ndarray:
        return self.to_pixels(image, height or image.height, width or image.width)


def scaling_bytes(height: int, width: int, scaled: tuple[int, int]) -> int:
    """Of the scaled image (height, width), and of the one in between that has the new width and the old height."""
    between = 0 if width == scaled[1] else height * scaled[1]
    return RGB_BYTES * (between + scaled[0] * scaled[1])
