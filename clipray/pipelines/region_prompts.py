"""Changes an image so that a network looks at a box of it: crops, blurs all else, or draws an ellipse around it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from clipray.job import EmbedRegions


def views(image: Image.Image, boxes: np.ndarray, how: EmbedRegions) -> Iterator[Image.Image]:
    """An image for each box, by the prompt `crop`, `blur` or `circle`.

    Args:
        image: RGB. boxes: (K, 4) x1, y1, x2, y2 in px, inside the image.
    """
    short = min(image.size)
    if how.prompt == "blur":  # once for all boxes
        blurred = image.filter(ImageFilter.GaussianBlur(how.blur.radius * short))
    for box in boxes.tolist():
        if how.prompt == "crop":
            yield image.crop(whole_px(box))
        elif how.prompt == "blur":
            yield only_within(image, blurred, whole_px(box))
        else:
            yield circled(image, box, how.circle.colour, max(1, round(how.circle.width * short)))


def whole_px(box: list[float]) -> tuple[int, int, int, int]:
    """The whole pixels that a box touches, at least one in each direction."""
    x1, y1 = int(np.floor(box[0])), int(np.floor(box[1]))
    return x1, y1, max(x1 + 1, int(np.ceil(box[2]))), max(y1 + 1, int(np.ceil(box[3])))


def only_within(image: Image.Image, outside: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """`outside`, with `image` in the box."""
    view = outside.copy()
    view.paste(image.crop(box), box[:2])
    return view


def circled(image: Image.Image, box: list[float], colour: str, width_px: int) -> Image.Image:
    """The image with the ellipse that touches the box's sides from within, as in Shtedritski et al. 2023 (arXiv 2304.06712)."""
    view = image.copy()
    x1, y1, x2, y2 = box
    last = max(x1, x2 - 1), max(y1, y2 - 1)  # Pillow counts the last pixel in
    ImageDraw.Draw(view).ellipse([x1, y1, *last], outline=colour, width=width_px)
    return view
