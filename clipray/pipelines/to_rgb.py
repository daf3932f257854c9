"""Any mode of Pillow to RGB, transparency composed on white; little memory is taken beside the image and the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from PIL import Image

from clipray.pipelines.deep_grey import (
    GreyType,
    finite_range,
    grey_type,
    is_deep_grey,
    samples_of,
    to_8_bits,
    white_of,
)

WHITE = (255, 255, 255, 255)
TILE_PIXELS = 2**18  # that are converted at once, where converting takes more than the result
Box = tuple[int, int, int, int]


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


def _boxes(image: Image.Image) -> Iterator[Box]:
    """Left, top, right, bottom of tiles of at most TILE_PIXELS that cover the image."""
    width = min(image.width, TILE_PIXELS)
    height = max(1, TILE_PIXELS // width)
    for top in range(0, image.height, height):
        for left in range(0, image.width, width):
            yield left, top, min(left + width, image.width), min(top + height, image.height)
