"""Any mode of Pillow to RGB, transparency composed on white; little memory is taken beside the image and the result.

Deep greys, of 16 bits, 32 bits and floats, become 8 bits by what the file's tags and the values say is white:

1. Unsigned integers of up to 16 bits: white is the largest value of the file's bits (BitsPerSample of a TIFF; PNG, PGM and JPEG
   2000 come scaled to 16). A TIFF's MaxSampleValue or SMaxSampleValue counts instead where it is that of a whole number of bits
   (255, 1,023, 4,095, …), or 1 of floats, and no value exceeds it.
2. Signed and 32-bit integers and floats have more room than images use: white is what the tag says, as above, or else the smallest
   of 1 (of floats), 255, 65,535 and the type's own largest value (of integers) that no value exceeds. Floats may exceed it by a
   quarter, as resampling leaves them.
3. Where (2) takes another than the smallest of those and nothing is lighter than a sixteenth of it, and where values lie below
   black by more than a quarter of white, nothing says what is meant: an error, rather than an image all black.

WhiteIsZero turns the result around. NaN is black; infinite values are white or black.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

WHITE = (255, 255, 255, 255)
TILE_PIXELS = 2**18  # that are converted at once, where converting takes more than the result
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE, SAMPLE_FORMAT, S_MAX_SAMPLE = 258, 262, 281, 339, 341  # tags of TIFF
SAMPLE_FORMATS = {1: "u", 2: "i", 3: "f"}  # by SampleFormat
WHITE_IS_ZERO = 0  # a PhotometricInterpretation
DARKEST = 1 / 16  # of white
OVERSHOOT = 0.25  # of white


def to_rgb(image: Image.Image, grey: GreyType | None = None) -> Image.Image:
    """An image of any mode in RGB, on white where it is transparent.

    Args:
        grey: of a deep grey what its file says, if `image` is not as it was opened.

    Raises:
        UnclearGrey: a deep grey of which nothing says which value is white.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if is_deep_grey(image):
        return _from_deep_grey(image, grey or grey_type(image))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _in_tiles(image, _on_white)
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image, grey: GreyType) -> Image.Image:
    ranges = [finite_range(samples_of(image.crop(box), grey)) for box in _boxes(image)]
    white = white_of(grey, min(low for low, _ in ranges), max(high for _, high in ranges))

    def convert(tile: Image.Image) -> Image.Image:
        samples = samples_of(tile, grey)
        values = to_8_bits(samples, grey, white)
        if "transparency" in image.info:
            values[samples == image.info["transparency"]] = 255
        return Image.fromarray(values).convert("RGB")

    return _in_tiles(image, convert)


def _on_white(tile: Image.Image) -> Image.Image:
    if tile.mode == "La":  # from which Pillow has no way to RGBA
        tile = tile.convert("LA")
    canvas = Image.new("RGBA", tile.size, WHITE)
    return Image.alpha_composite(canvas, tile.convert("RGBA")).convert("RGB")


def _in_tiles(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`convert` applied to each tile: the same as to the whole, since it looks at one pixel at a time."""
    result = Image.new("RGB", image.size)
    for box in _boxes(image):
        result.paste(convert(image.crop(box)), box)
    return result


def _boxes(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Left, top, right, bottom of tiles of at most TILE_PIXELS that cover the image."""
    width = min(image.width, TILE_PIXELS)
    height = max(1, TILE_PIXELS // width)
    for top in range(0, image.height, height):
        for left in range(0, image.width, width):
            yield left, top, min(left + width, image.width), min(top + height, image.height)


class UnclearGrey(ValueError):
    """Nothing says which value of an image is white."""


@dataclass(frozen=True)
class GreyType:
    """What a file says of its greys.

    Attributes:
        sample_format: of the samples: "u" unsigned, "i" signed integers, "f" floats. bits: of a sample that count.
        declared: the largest sample, if a tag says so. white_is_zero: small values are light.
    """

    sample_format: str
    bits: int
    declared: float | None = None
    white_is_zero: bool = False


def is_deep_grey(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def grey_type(image: Image.Image) -> GreyType:
    """Of a deep grey as it was opened: its tags are there no more once it is transposed or copied."""
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        if image.mode == "F":
            return GreyType("f", 32)
        scaled = image.mode.startswith("I;16") or image.format == "PPM"  # Pillow scales a PGM of any maxval
        return GreyType("u", 16) if scaled else GreyType("i", 32)
    sample_format = SAMPLE_FORMATS.get(int(_first(tags.get(SAMPLE_FORMAT)) or 1), "u")
    declared = _first(tags.get(S_MAX_SAMPLE)) or _first(tags.get(MAX_SAMPLE))
    return GreyType(
        sample_format="f" if image.mode == "F" else sample_format,
        bits=int(_first(tags.get(BITS_PER_SAMPLE)) or 1),
        declared=declared,
        white_is_zero=_first(tags.get(PHOTOMETRIC)) == WHITE_IS_ZERO,
    )


def _first(value: object) -> float | None:
    """A tag's value, the first where it has one for each sample; None where there is no number."""
    first = value[0] if isinstance(value, tuple) and value else value
    try:
        return float(first)  # type: ignore[arg-type]
    except (TypeError, ValueError, ArithmeticError):
        return None


def samples_of(image: Image.Image, grey: GreyType) -> np.ndarray:
    """(H, W) samples; Pillow keeps unsigned integers of 32 bits as signed ones."""
    samples = np.asarray(image)
    unsigned = grey.sample_format == "u" and grey.bits == 32 and samples.dtype == np.int32
    return samples.view(np.uint32) if unsigned else samples


def finite_range(samples: np.ndarray) -> tuple[float, float]:
    """The least and the largest finite value; infinity and minus infinity where there is none."""
    finite = samples[np.isfinite(samples)] if samples.dtype.kind == "f" else samples
    return (float(finite.min()), float(finite.max())) if finite.size else (np.inf, -np.inf)


def white_of(grey: GreyType, low: float, high: float) -> float:
    """Which value is white, by the rule above. `low`, `high`: the image's least and largest finite value.

    Raises:
        UnclearGrey: nothing says so.
    """
    if low > high:
        raise UnclearGrey("no finite value among its floats")
    room = 1 + OVERSHOOT if grey.sample_format == "f" else 1
    if _is_white(grey) and high <= float(grey.declared or 0) * room:
        white = float(grey.declared or 0)
    elif grey.sample_format == "u" and grey.bits <= 16:
        return 2.0**grey.bits - 1
    else:
        whites = _whites(grey)
        white = next((white for white in whites if high <= white * room), np.inf)
        if white > whites[0] and high <= white * DARKEST:
            raise UnclearGrey(_unclear(grey, low, high, whites))
    if low < -OVERSHOOT * white:
        raise UnclearGrey(_unclear(grey, low, high, [white]))
    return white


def _whites(grey: GreyType) -> list[float]:
    if grey.sample_format == "f":
        return [1.0, 255.0, 65_535.0]
    largest = 2.0 ** (grey.bits - (grey.sample_format == "i")) - 1
    return [white for white in (255.0, 65_535.0) if white < largest] + [largest]


def _is_white(grey: GreyType) -> bool:
    """Whether what a tag declares is no mere statistic of this image."""
    if grey.declared is None or not np.isfinite(grey.declared):
        return False
    bits = np.log2(grey.declared + 1) if grey.declared > 0 else 0
    return bool((grey.sample_format == "f" and grey.declared == 1) or (bits >= 8 and bits == int(bits)))


def _unclear(grey: GreyType, low: float, high: float, whites: list[float]) -> str:
    name = {"u": "unsigned integers", "i": "signed integers", "f": "floats"}[grey.sample_format]
    return (
        f"greys of {grey.bits}-bit {name} from {low:g} to {high:g}: nothing says which values are black and white; expected 0 to "
        f"{' or '.join(f'{white:g}' for white in whites)}, or a MaxSampleValue of a whole number of bits"
    )


def to_8_bits(samples: np.ndarray, grey: GreyType, white: float) -> np.ndarray:
    """(H, W) samples to uint8: 0 is black, `white` is 255, rounded, halves to even."""
    values = samples.astype(np.float64)
    values = (white - values if grey.white_is_zero else values) * 255 / white
    return np.asarray(np.nan_to_num(values).clip(0, 255).round(), dtype=np.uint8)
