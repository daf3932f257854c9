"""A picture from its URI or bytes to pixels: fetch, decode as people see it, preprocess as the model's own transform.

Nothing here raises for a bad picture but `Refused`, which carries the reason for the `rejects` table.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from clipray.encoders.image_fetch import checked_bytes, fetch
from clipray.encoders.png_metadata import without_large_metadata
from clipray.encoders.refusals import Limits, Refused

# First bytes of the formats that people keep pictures in: such a file that does not open is a broken picture.
SIGNATURES = (
    b"\xff\xd8",
    b"\x89PNG",
    b"GIF8",
    b"BM",
    b"II*\x00",
    b"MM\x00*",
    b"\x00\x00\x00\x0cjP",
    b"P5\n",
    b"P6\n",
)
# What Pillow recognises but only another program or a stub can decode; EPS would start Ghostscript on a stranger's file.
NOT_PICTURES = ("EPS", "MPEG", "HDF5", "GRIB", "BUFR", "WMF")
WHITE = (255, 255, 255, 255)


def prepare_pillow() -> None:
    """Let `Limits.max_pixels` be the only bound: Pillow's own is process-wide and lower than what a job may allow."""
    Image.MAX_IMAGE_PIXELS = None


def decode(data: bytes, limits: Limits, *, draft_px: int | None = None) -> Image.Image:
    """The picture as people see it, in RGB.

    EXIF orientation is applied, CMYK and palettes are converted, 16-bit and float greys are scaled to 8 bits, alpha is
    composed on white, and of an animation the first frame is taken.

    Args:
        data: the file's bytes.
        limits: `max_pixels` is checked before pixels are decoded.
        draft_px: let a JPEG decode at a reduced scale, with both sides still at least this long.

    Raises:
        Refused: not_an_image, truncated, undecodable or too_many_pixels.
    """
    try:
        image = Image.open(io.BytesIO(without_large_metadata(data)), formats=_formats())
        height, width = image.height, image.width
        if height * width > limits.max_pixels:
            raise Refused(
                "decode", "too_many_pixels", f"{height} x {width} px, more than max_pixels={limits.max_pixels}"
            )
        if draft_px and image.format == "JPEG":
            image.draft("RGB" if image.mode == "RGB" else None, (draft_px, draft_px))
        image.load()
        return to_rgb(_upright(image))
    except Refused:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything
        raise _refusal(data, error) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_PICTURES)


def _refusal(data: bytes, error: Exception) -> Refused:
    text = f"{type(error).__name__}: {error}".replace("\n", " ")
    webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    if webp and len(data) < 8 + int.from_bytes(data[4:8], "little"):  # Pillow does not say so
        return Refused(
            "decode",
            "truncated",
            f"{len(data)} bytes of the {int.from_bytes(data[4:8], 'little') + 8} that its header names",
        )
    if isinstance(error, UnidentifiedImageError):
        if webp or data.startswith(SIGNATURES) or data[4:12] in (b"ftypavif", b"ftypavis"):
            return Refused(
                "decode", "undecodable", f"starts like a picture, but its header cannot be read ({len(data)} bytes)"
            )
        return Refused(
            "decode", "not_an_image", f"{len(data)} bytes starting {data[:8]!r} are no picture that Pillow knows"
        )
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return Refused("decode", "truncated", text)
    return Refused("decode", "undecodable", text)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB, transparency composed on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, WHITE)
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greys to 8 bits; Pillow's own `convert` would clip everything above 255."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        values = values * 255 if np.nanmax(values, initial=0) <= 1 else values
    else:
        transparent = values == image.info.get("transparency")
        values = values / (257 if values.max(initial=0) <= 65_535 else 16_843_009)
        values[transparent] = 255  # on white
    return Image.fromarray(np.nan_to_num(values).clip(0, 255).round().astype(np.uint8))


@dataclass(frozen=True)
class Picture:
    """Pixels ready for the encoder, (H, W, 3) uint8, and the original's size in px."""

    pixels: np.ndarray
    height: int
    width: int


def load_picture(
    uri: str | None,
    data: bytes | None,
    limits: Limits,
    preprocess: Callable[..., np.ndarray],
    draft_px: int | None = None,
    *,
    by_size: bool = False,
) -> Picture | Refused:
    """Fetch (unless `data` is given), decode and preprocess one picture; a bad one comes back as its refusal.

    `preprocess` takes the image; with `by_size` also the original's height and width, which a JPEG that was decoded at
    a reduced scale no longer has exactly.
    """
    try:
        if data is None and not uri:
            raise Refused("manifest", "no_source", "neither `uri` nor `bytes`")
        raw = checked_bytes(data, limits) if data is not None else fetch(str(uri), limits)
        image = decode(raw, limits, draft_px=draft_px)
        height, width = _original_size(raw, image) if draft_px else (image.height, image.width)
        return Picture(preprocess(image, height, width) if by_size else preprocess(image), height, width)
    except Refused as refused:
        return refused
    except Exception as error:  # a row is never worth the job
        return Refused("decode", "undecodable", f"{type(error).__name__}: {error}")


def _original_size(data: bytes, image: Image.Image) -> tuple[int, int]:
    """Height and width before any reduced-scale decoding, turned as the upright `image` is."""
    with Image.open(io.BytesIO(without_large_metadata(data)), formats=_formats()) as original:
        if original.format != "JPEG":  # always decoded whole
            return image.height, image.width
        return (original.width, original.height) if _turned(original) else (original.height, original.width)


def _turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # as in `_upright`
        return False
