"""An image from its URI or bytes to pixels: fetch, decode as people see it, preprocess as the model's own transform.

Nothing here raises for a bad image but `Rejected`, which carries the reason for the `rejects` table.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from clipray.models.preprocess import RGB_BYTES, Preprocess
from clipray.pipelines.decode_memory import DecodeMemory, decode_budget, decode_bytes
from clipray.pipelines.image_fetch import Fetcher
from clipray.pipelines.png_metadata import without_large_metadata
from clipray.pipelines.spec import Limits
from clipray.pipelines.to_rgb import UnclearGrey, grey_type, is_deep_grey, to_rgb
from clipray.tables.reasons import Rejected

# First bytes of common image formats: a file that starts so and does not open is a broken image.
SIGNATURES = (
    b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"\x00\x00\x00\x0cjP", b"P5\n", b"P6\n",
)  # fmt: skip
# What Pillow recognises but only another program or a stub can decode; EPS would start Ghostscript on a stranger's file.
NOT_IMAGES = ("EPS", "MPEG", "HDF5", "GRIB", "BUFR", "WMF")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
Turn = Image.Transpose
TURNS = {
    2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM,
    5: Turn.TRANSPOSE, 6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90,
}  # fmt: skip
"""How an image becomes upright, by its EXIF orientation; without one a copy would take as much memory again."""
QUARTERS = (Turn.TRANSPOSE, Turn.ROTATE_270, Turn.TRANSVERSE, Turn.ROTATE_90)


def prepare_pillow() -> None:
    """Let Pillow not warn of images between its own bound and twice that, for which it raises: `Limits.max_pixels` decides."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def decode(data: bytes, limits: Limits, *, draft_px: int | None = None) -> Image.Image:
    """The image as people see it, in RGB.

    EXIF orientation is applied, CMYK and palettes are converted, 16-bit and float greys are scaled to 8 bits
    (`to_rgb`), alpha is composed on white, and of an animation the first frame is taken.

    Args:
        data: the file's bytes.
        limits: `max_pixels` is checked before pixels are decoded.
        draft_px: let a JPEG decode at a reduced scale, with both sides still at least this long.

    Raises:
        Rejected: not_an_image, truncated, undecodable or too_many_pixels.
    """
    return Opened(data, limits).decoded(draft_px)[0]


class Opened:
    """An image whose header is read, but no pixel yet. Raises Rejected as `decode`."""

    def __init__(self, data: bytes, limits: Limits) -> None:
        self._data, self._limits = data, limits
        with _rejecting(data, limits):
            self._image: Image.Image = Image.open(io.BytesIO(without_large_metadata(data)), formats=_formats())
            _check_size(self._image, limits)
            self._jpeg = self._image.format == "JPEG"
            # Others may say it behind the pixels.
            self._turn = TURNS.get(_orientation(self._image)) if self._jpeg else None

    @property
    def format(self) -> str | None:
        return self._image.format

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width in px, as the header has them."""
        return self._image.height, self._image.width

    def decode_bytes(self) -> int:
        """What `decoded` takes at most."""
        with _rejecting(self._data, self._limits):
            return decode_bytes(self._image, self._data, self._turn is not None)

    def decoded(self, draft_px: int | None = None) -> tuple[Image.Image, int, int]:
        """Upright, in RGB, and the height and width in px that it has unless a JPEG is decoded smaller; to be called once."""
        with _rejecting(self._data, self._limits):
            image: Image.Image = self._image
            size = self.stored_size
            if draft_px and self._jpeg:
                image.draft("RGB" if image.mode == "RGB" else None, (draft_px, draft_px))
            image.load()
            _check_size(image, self._limits)  # the header of an ICO may say less than what it holds
            grey = grey_type(image) if is_deep_grey(image) else None
            turn = self._turn if self._jpeg else TURNS.get(_orientation(image))
            if turn is not None:
                self._image = image = image.transpose(turn)
            image = to_rgb(image, grey)
        if not self._jpeg:
            size = image.height, image.width
        elif turn in QUARTERS:
            size = size[1], size[0]
        return image, *size


def _check_size(image: Image.Image, limits: Limits) -> None:
    if image.height * image.width > limits.max_pixels:
        message = f"{image.height} x {image.width} px, more than max_pixels={limits.max_pixels}"
        raise Rejected("decode", "too_many_pixels", message)


@contextlib.contextmanager
def _rejecting(data: bytes, limits: Limits) -> Iterator[None]:
    """Whatever Pillow raises is a rejection.

    Pillow's own bound holds for the process, and backs ours where images hold others (ICO): so it is set for each image.
    """
    Image.MAX_IMAGE_PIXELS = limits.max_pixels
    try:
        yield
    except Rejected:
        raise
    except Image.DecompressionBombError as error:
        raise Rejected("decode", "too_many_pixels", f"more than max_pixels={limits.max_pixels}: {error}") from error
    except UnclearGrey as error:
        raise Rejected("decode", "undecodable", str(error)) from error
    except Exception as error:  # Pillow's plugins raise nearly anything
        raise _rejection(data, error) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in Image.ID if name not in NOT_IMAGES)


def _rejection(data: bytes, error: Exception) -> Rejected:
    text = f"{type(error).__name__}: {error}".replace("\n", " ")
    webp, size = data[:4] == b"RIFF" and data[8:12] == b"WEBP", 8 + int.from_bytes(data[4:8], "little")
    if webp and len(data) < size:  # Pillow does not say so
        return Rejected("decode", "truncated", f"{len(data)} bytes of the {size} that its header names")
    if isinstance(error, UnidentifiedImageError):
        heif = data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS
        if heif and "HEIF" not in _formats():
            message = 'HEIC needs another package: pip install "clipray[heif]" on every machine'
            return Rejected("decode", "undecodable", message)
        if webp or heif or data.startswith(SIGNATURES) or data[4:12] in (b"ftypavif", b"ftypavis"):
            message = f"starts like an image, but its header cannot be read ({len(data)} bytes)"
            return Rejected("decode", "undecodable", message)
        message = f"{len(data)} bytes starting {data[:8]!r} are in no image format that Pillow knows"
        return Rejected("decode", "not_an_image", message)
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return Rejected("decode", "truncated", text)
    return Rejected("decode", "undecodable", text)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


@dataclass(frozen=True)
class DecodedImage:
    """Pixels ready for the encoder, (H, W, 3) uint8, and the size of the original in px."""

    pixels: np.ndarray
    height: int
    width: int


def load_image(
    uri: str | None,
    data: bytes | None,
    limits: Limits,
    preprocess: Preprocess,
    draft_px: int | None = None,
    memory: DecodeMemory | None = None,
) -> DecodedImage | Rejected:
    """Fetch (unless there is `data`), decode and preprocess one image. Returns Rejected for a bad one; never raises.

    `memory`: of `decode_budget`, shared by those that decode at the same time.
    """
    try:
        raw = Fetcher(limits).read(uri, data)
        opened = Opened(raw, limits)
        needed = _bytes_needed(opened, preprocess, limits)
        with memory.hold(needed) if memory else contextlib.nullcontext():
            image, height, width = opened.decoded(draft_px)
            return DecodedImage(preprocess(image, height, width), height, width)
    except Rejected as rejected:
        return rejected
    except Exception as error:  # a row is never worth the job
        return Rejected("decode", "undecodable", f"{type(error).__name__}: {error}")


def _bytes_needed(opened: Opened, preprocess: Preprocess, limits: Limits) -> int:
    """To decode and to preprocess. Raises Rejected: too_many_pixels, where that is more than all may take together."""
    height, width = opened.stored_size
    # Which of the two is the height may be known later.
    scratch = max(preprocess.scratch_bytes(height, width), preprocess.scratch_bytes(width, height))
    needed = max(opened.decode_bytes(), RGB_BYTES * height * width + scratch)
    most = decode_budget(limits.max_pixels)
    if needed > most:
        message = (
            f"{height} x {width} px of {opened.format} take {needed} bytes to decode and scale, more than the {most} "
            f"that go with max_pixels={limits.max_pixels}"
        )
        raise Rejected("decode", "too_many_pixels", message)
    return needed
