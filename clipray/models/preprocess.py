"""How a decoded image becomes the network's input, and what memory that takes beside it.

The driver reads the bounds below, so torchvision is imported only where a transform is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from clipray.models.geometry import geometry, scaled_size, scaling_pixels
from clipray.models.resolve import PREPROCESS, ResolvedModel
from clipray.tables.reasons import Rejected

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


def preprocess_of(
    model: ResolvedModel,
    max_pixels: int = MAX_PIXELS,
    *,
    keep_aspect: tuple[int, int] | None = None,
    rounded: bool = False,
) -> Preprocess:
    """The half of a model's own inference transform that makes an image (H, W, 3) uint8; the encoder does the rest.

    open_clip's own steps, or what is equal to timm's and transformers' (with Pillow), pixel by pixel.

    A JPEG that was decoded smaller is scaled by the sides of its original.

    Args:
        max_pixels: of what Pillow makes to scale an image; one that takes more is Rejected as too_many_pixels.
        keep_aspect: (long side, multiple of both sides) in px. Then the whole image is scaled to that, and none is cropped.
        rounded: scale a JPEG that was decoded smaller by its own sides, which are rounded up, as in older tables.
    """
    resample = Image.Resampling[str(model.preprocess["interpolation"]).upper().replace("RANDOM", "BICUBIC")]
    steps = [] if keep_aspect else _steps(model, resample)

    def to_pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
        if rounded and not keep_aspect:
            height, width = image.height, image.width
        scaled = scaled_size(height, width, model.preprocess, keep_aspect)
        if message := too_large_scaled(image.height, image.width, scaled, max_pixels):
            raise Rejected("decode", "too_many_pixels", message)
        if keep_aspect or image.size != (width, height):
            box = None if rounded else _covered(image, height, width)
            image = image.resize(scaled[::-1], resample, box=box)
        for step in steps:
            image = step(image)
        return np.asarray(image, dtype=np.uint8)

    def scratch_bytes(height: int, width: int) -> int:
        scaled = scaled_size(height, width, model.preprocess, keep_aspect)
        return RGB_BYTES * sum(scaling_pixels(height, width, scaled))

    return Preprocess(to_pixels, scratch_bytes)


def _steps(model: ResolvedModel, resample: Image.Resampling) -> list[Callable[[Image.Image], Image.Image]]:
    """Of the model's transform, up to where the image becomes a tensor."""
    if "scale_to" in model.preprocess:
        return [partial(_scaled_and_cropped, preprocess=model.preprocess, resample=resample)]
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms import Normalize, ToTensor

    of_open_clip = {key: value for key, value in model.preprocess.items() if key in PREPROCESS}
    transform: Any = image_transform_v2(PreprocessCfg(**of_open_clip), is_train=False)
    return [step for step in transform.transforms if not isinstance(step, (Normalize, ToTensor))]


def _scaled_and_cropped(image: Image.Image, preprocess: Mapping[str, Any], resample: Image.Resampling) -> Image.Image:
    """The image scaled to `scale_to`, and cropped or padded to `size` around its centre."""
    scaled, place = scaled_size(image.height, image.width, preprocess), geometry(image.height, image.width, preprocess)
    if image.size != scaled[::-1]:
        image = image.resize(scaled[::-1], resample)
    fill = preprocess["fill_color"]
    cropped = Image.new("RGB", (place.input_width, place.input_height), tuple(fill) if fill else 0)
    cropped.paste(image, (-place.left, -place.top))
    return cropped


def too_large_scaled(height: int, width: int, scaled: tuple[int, int], max_pixels: int) -> str | None:
    """Why an image of `height` x `width` px is not scaled to `scaled` (height, width), or None if it may be.

    Pillow makes the whole scaled image before anything is cropped: of a thin image it is far larger than the input.
    """
    if max(scaling_pixels(height, width, scaled)) <= max_pixels:
        return None
    return (
        f"{height} x {width} px, which the model's preprocessing scales to {scaled[0]} x {scaled[1]} px: "
        f"more than max_pixels={max_pixels}"
    )


def _covered(image: Image.Image, height: int, width: int) -> tuple[float, float, float, float] | None:
    """Left, top, right, bottom of what an image shows of its original of `height` x `width` px; None for all of it.

    A JPEG decoded at a half, a quarter or an eighth has its sides rounded up: its last row and column may be half empty.
    """
    if image.size == (width, height):
        return None
    scale = 2 ** round(np.log2(max(height, width) / max(image.size)))
    return 0, 0, min(width / scale, image.width), min(height / scale, image.height)
