"""Contact sheets: rows of small images under their titles, as one image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER = (250, 249, 246)
INK = (40, 40, 44)
TITLE_PX = 24


def contact_sheet(
    rows: Iterable[tuple[str, Sequence[Image.Image]]], *, side_px: int = 128, gap_px: int = 6
) -> Image.Image:
    """Lay out rows of (title, images); a row without a title follows the one above it closely.

    Images are scaled to fit a square of `side_px`, their aspect kept; rows may be of different lengths.
    """
    rows = list(rows)
    columns = max((len(images) for _, images in rows), default=1)
    width = gap_px + columns * (side_px + gap_px)
    height = gap_px + sum(side_px + gap_px + (TITLE_PX if title else 0) for title, _ in rows)
    sheet = Image.fromarray(np.full((height, width, 3), PAPER, np.uint8))
    pen, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(15), gap_px
    for title, images in rows:
        if title:
            pen.text((gap_px, top + 2), title, fill=INK, font=font)
            top += TITLE_PX
        for column, image in enumerate(images):
            small = image.convert("RGB")
            small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
            left = gap_px + column * (side_px + gap_px)
            sheet.paste(small, (left + (side_px - small.width) // 2, top + (side_px - small.height) // 2))
        top += side_px + gap_px
    return sheet
