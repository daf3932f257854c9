"""How much memory an image takes while it becomes RGB, and the budget of all that are decoded at a time."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator

from PIL import Image

from clipray.models.preprocess import RGB_BYTES
from clipray.storage.memory import give_back

BYTES_PER_PIXEL = 11.5  # of `max_pixels`: the budget; the rest of 12 is for what each thread takes whatever it decodes
LEAST_BYTES = 64 * 2**20  # of a budget, whatever `max_pixels` is
STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # of a pixel, by mode; else 4
OTHER_BYTES = 8  # of a pixel, that decoders in Python take beside the image
# What decoders take beside Pillow's own image, in bytes a pixel; measured by benchmarks/decode_memory.py, rounded up.
DECODER_BYTES = {
    "WEBP": 12,  # the animation's two canvases, and the copy that is handed over
    "AVIF": 20,  # planes of 16 bits with alpha, RGBA, and the copy that is handed over
    "HEIF": 12,  # planes, the decoded image with alpha, and the copy that is handed over
    "GIF": 2,
    **dict.fromkeys(("PNG", "PCX", "TGA", "SUN"), 0),  # a row at a time
}
JPEG_2000_BYTES = 6  # for each band: integers of 32 bits, and the copy that is handed over
JPEG_COEFFICIENT_BYTES = 2  # for each band, where there are several scans
LIBTIFF_BYTES = 4  # at least, of a strip or tile

EMBEDDED = re.compile(rb"\x89PNG\r\n\x1a\n.{8}(.{4})(.{4})|\xff\x4f\xff\x51.{4}(.{4})(.{4})", re.DOTALL)
"""The width and height of a PNG or a JPEG 2000 within another file."""
TILE_WIDTH, TILE_HEIGHT, ROWS_PER_STRIP, BITS_PER_SAMPLE, SAMPLES = 322, 323, 278, 258, 277  # tags of TIFF


def decode_budget(max_pixels: int) -> int:
    """Bytes that all images which are decoded at a time may take together."""
    return max(int(BYTES_PER_PIXEL * max_pixels), LEAST_BYTES)


class ByteBudget:
    """Bytes that threads share. Whoever needs more than the total gets them when nobody else holds any."""

    def __init__(self, total_bytes: int) -> None:
        self._total, self._held = total_bytes, 0
        self._changed = threading.Condition()

    @property
    def held(self) -> int:
        return self._held

    def acquire(self, n_bytes: int) -> None:
        """Wait until `n_bytes` are free, and hold them."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + n_bytes <= self._total)
            self._held += n_bytes

    def release(self, n_bytes: int) -> None:
        with self._changed:
            self._held -= n_bytes
            self._changed.notify_all()


class DecodeMemory:
    """The budget that the decoding threads of a worker share, counting what they have freed but the allocator still keeps.

    glibc keeps freed memory for each thread: four threads that decode one after the other would hold four times what one
    takes. So freed memory goes back to the system each time that a whole budget has been asked for.
    """

    def __init__(self, total_bytes: int) -> None:
        self._budget, self._total = ByteBudget(total_bytes), total_bytes
        self._asked, self._lock = 0, threading.Lock()

    @contextlib.contextmanager
    def hold(self, n_bytes: int) -> Iterator[None]:
        """Hold `n_bytes` for as long as the block runs. A thread must not hold twice: it could wait for itself."""
        self._budget.acquire(n_bytes)
        try:
            with self._lock:
                self._asked += n_bytes
                if self._asked > self._total:
                    give_back()
                    self._asked = self._budget.held
            yield
        finally:
            self._budget.release(n_bytes)


def decode_bytes(image: Image.Image, data: bytes, turned: bool) -> int:
    """What it takes at most to make an opened image, whose file is `data`, upright RGB. `turned`: a JPEG is not upright yet."""
    pixels = image.width * image.height
    if image.format in ("ICO", "ICNS"):  # whose own header may say less
        pixels = max(pixels, _embedded_pixels(data))
    stored = STORED_BYTES.get(image.mode, 4)
    decoding = stored * pixels + _decoder_bytes(image, data, pixels)
    plain = image.format == "JPEG" and not turned  # of the others an orientation may stand behind the pixels
    turning = 0 if plain else 2 * stored * pixels
    converting = 0 if plain and image.mode == "RGB" else (stored + RGB_BYTES) * pixels
    return max(decoding, turning, converting)


def _decoder_bytes(image: Image.Image, data: bytes, pixels: int) -> int:
    """What a decoder takes beside Pillow's own image."""
    bands = len(image.getbands())
    if image.format in ("JPEG", "MPO"):
        return JPEG_COEFFICIENT_BYTES * bands * pixels if several_scans(data) else 0
    if image.format == "JPEG2000":
        return JPEG_2000_BYTES * bands * pixels
    if image.format == "TIFF":
        return _libtiff_bytes(image)
    return DECODER_BYTES.get(image.format or "", OTHER_BYTES) * pixels


def several_scans(jpeg: bytes) -> bool:
    """Whether a JPEG keeps the coefficients of the whole image: it is progressive, or its first scan lacks a component."""
    components, position = 0, 2
    while position + 4 <= len(jpeg):
        if jpeg[position] != 0xFF:
            return True  # damaged, so the dearer case
        marker = jpeg[position + 1]
        if marker in (0xFF, 0x01) or 0xD0 <= marker <= 0xD8:  # padding and markers without a length
            position += 1 if marker == 0xFF else 2
            continue
        if marker in (0xC2, 0xC6, 0xCA, 0xCE):  # progressive
            return True
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and position + 10 <= len(jpeg):
            components = jpeg[position + 9]
        if marker == 0xDA:
            return position + 5 > len(jpeg) or jpeg[position + 4] < components
        position += 2 + int.from_bytes(jpeg[position + 2 : position + 4])
    return True


def _libtiff_bytes(image: Image.Image) -> int:
    """Of the strip or tile that libtiff decodes at once; a tile may be far larger than its image."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (1,))
    sample_bits = max(bits) * max(len(bits), _number(tags.get(SAMPLES), 1))
    width = _number(tags.get(TILE_WIDTH), image.width)
    height = _number(tags.get(TILE_HEIGHT), min(_number(tags.get(ROWS_PER_STRIP), image.height), image.height))
    return width * height * max(LIBTIFF_BYTES, (sample_bits + 7) // 8)


def _number(value: object, default: int) -> int:
    first = value[0] if isinstance(value, tuple) and value else value
    return first if isinstance(first, int) and first > 0 else default


def _embedded_pixels(data: bytes) -> int:
    sizes = [[int.from_bytes(side) for side in match.groups() if side] for match in EMBEDDED.finditer(data)]
    return max((sides[0] * sides[1] for sides in sizes if len(sides) == 2), default=0)
