"""What images take while they are decoded is known from their headers, and what would take too much is refused unread."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from support import AS_IT_IS

from clipray.job import Model
from clipray.models.preprocess import Preprocess, preprocess_of
from clipray.models.resolve import resolve
from clipray.pipelines import decode as module
from clipray.pipelines.decode import DecodedImage, load_image, prepare_pillow
from clipray.pipelines.decode_memory import LEAST_BYTES, DecodeMemory, decode_budget, decode_bytes, several_scans
from clipray.pipelines.image_loader import ImageLoader
from clipray.pipelines.spec import ImageSpec, Limits
from clipray.tables.reasons import Rejected

SIDE = 100
PIXELS = SIDE * SIDE


@pytest.fixture(autouse=True)
def _pillow() -> None:
    prepare_pillow()


def encoded(kind: str, mode: str = "RGB", side: int = SIDE, **options: Any) -> bytes:
    sink = io.BytesIO()
    Image.new(mode, (side, side)).save(sink, kind, **options)
    return sink.getvalue()


def needed(data: bytes, turned: bool = False) -> int:
    return decode_bytes(Image.open(io.BytesIO(data)), data, turned)


def test_bytes_of_a_pixel_by_hand() -> None:
    """Pillow stores RGB in 4 bytes; others are there beside the RGB that they become; a turned image is there twice."""
    cases = [
        (encoded("JPEG"), 4),
        (encoded("JPEG", "L"), 1 + 4),
        (encoded("JPEG", "CMYK"), 4 + 4),
        (encoded("JPEG", progressive=True), 4 + 3 * 2),
        (encoded("JPEG", "CMYK", progressive=True), 4 + 4 * 2),
        (encoded("PNG", "L"), 1 + 4),
        (encoded("PNG", "RGBA"), 4 + 4),
        (encoded("PNG", "I;16"), 2 + 4),
        (encoded("PNG"), 4 + 4),  # its orientation may stand behind its pixels
        (encoded("WEBP"), 4 + 12),
        (encoded("GIF", "P"), 1 + 4),
        (encoded("TIFF", compression="tiff_deflate", tiffinfo={278: SIDE}), 4 + 4),
        (encoded("TIFF", "F", compression="tiff_deflate", tiffinfo={278: SIDE}), 4 + 4),
    ]
    assert [needed(data) / PIXELS for data, _ in cases] == [each for _, each in cases]
    assert needed(encoded("JPEG"), turned=True) == 8 * PIXELS


def test_scans_of_a_jpeg() -> None:
    assert not several_scans(encoded("JPEG"))
    assert not several_scans(encoded("JPEG", "L"))
    assert not several_scans(encoded("JPEG", exif=b"Exif\0\0" + b"\xff\xda\xff\xc2" * 50))
    assert several_scans(encoded("JPEG", progressive=True))
    whole = encoded("JPEG")
    at = whole.index(b"\xff\xda") + 4
    assert several_scans(whole[:at] + b"\1" + whole[at + 1 :])  # the first scan has one component of three
    for length in range(len(whole)):
        several_scans(whole[:length])  # ends, whatever is cut


def test_the_budget_has_a_floor() -> None:
    assert decode_budget(100_000_000) == 1_150_000_000
    assert decode_budget(1) == LEAST_BYTES


def refusal(data: bytes, limits: Limits, preprocess: Preprocess = AS_IT_IS) -> str:
    result = load_image(None, data, limits, preprocess)
    assert isinstance(result, Rejected), result
    assert (result.stage, result.reason) == ("decode", "too_many_pixels"), result.message
    return result.message


def test_an_image_that_takes_more_than_all_together_may_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipray.pipelines.decode_memory.LEAST_BYTES", 0)
    limits = Limits(max_pixels=PIXELS)
    message = refusal(encoded("WEBP"), limits)
    assert f"100 x 100 px of WEBP take {16 * PIXELS} bytes" in message
    assert f"the {115 * PIXELS // 10} that go with max_pixels={PIXELS}" in message
    assert isinstance(load_image(None, encoded("JPEG"), limits, AS_IT_IS), DecodedImage)
    large = Preprocess(lambda image, _height, _width: np.asarray(image), lambda _height, _width: 8 * PIXELS)
    assert "to decode and scale" in refusal(encoded("JPEG"), limits, large)


def tile_bomb(side: int) -> bytes:
    """A TIFF of 16 x 16 px in one tile of `side` x `side` px."""
    data = zlib.compress(bytes(side * side))
    entries = [
        (256, 4, 16), (257, 4, 16), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1),
        (322, 4, side), (323, 4, side), (324, 4, 8), (325, 4, len(data)),
    ]  # fmt: skip
    body = b"".join(
        struct.pack("<HHII" if kind == 4 else "<HHIHxx", tag, kind, 1, value) for tag, kind, value in entries
    )
    start = 8 + len(data) + len(data) % 2
    return (
        b"II*\0"
        + struct.pack("<I", start)
        + data.ljust(start - 8, b"\0")
        + struct.pack("<H", len(entries))
        + body
        + bytes(4)
    )


def test_a_tiff_of_few_pixels_in_a_huge_tile_is_refused() -> None:
    assert isinstance(load_image(None, tile_bomb(16), Limits(), AS_IT_IS), DecodedImage)
    assert "16 x 16 px of TIFF take" in refusal(tile_bomb(6_000), Limits(max_pixels=10_000_000))


def icon(side: int) -> bytes:
    """An ICO whose directory says 16 x 16 px, and whose PNG has more."""
    png = encoded("PNG", side=side)
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png


def test_an_icon_larger_than_its_directory_says_is_refused() -> None:
    assert isinstance(load_image(None, icon(SIDE), Limits(), AS_IT_IS), DecodedImage)
    prepare_pillow()
    assert "100 x 100 px, more than max_pixels=9999" in refusal(icon(SIDE), Limits(max_pixels=PIXELS - 1))
    assert "max_pixels=10000" in refusal(icon(2 * SIDE), Limits(max_pixels=PIXELS))  # Pillow's own bound


def test_what_threads_have_freed_is_given_back_before_it_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[bool] = []
    monkeypatch.setattr("clipray.pipelines.decode_memory.give_back", lambda: given_back.append(True))
    memory, counts = DecodeMemory(100), []
    for size in [60, 40, 1, 99, 1, 98, 1, 1]:  # 60 + 40, then 1 + 99, then 1 + 98 + 1, then 1
        with memory.hold(size):
            counts.append(len(given_back))
    assert counts == [0, 0, 1, 1, 2, 2, 2, 3]


def test_scaling_by_hand() -> None:
    taken = preprocess_of(resolve(Model(name="demo"))).scratch_bytes
    assert taken(600, 800) == 4 * (600 * 85 + 64 * 85)
    assert taken(600, 64) == 4 * 600 * 64  # the width is the network's already


def loader(max_pixels: int, threads: int) -> ImageLoader:
    model, limits = resolve(Model(name="demo")), Limits(max_pixels=max_pixels)
    return ImageLoader(ImageSpec(model=model, limits=limits, schema=pa.schema([]), threads=threads))


def test_what_is_decoded_at_a_time_stays_within_the_budget_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third image takes two thirds of the budget, so no two of those are decoded at a time."""
    monkeypatch.setattr("clipray.pipelines.decode_memory.LEAST_BYTES", 0)
    lock, held, most, at_once = threading.Lock(), [0], [0], [0]
    decoded = module.Opened.decoded

    def counted(opened: module.Opened, draft_px: int | None = None) -> Any:
        size = opened.decode_bytes()
        with lock:
            held[0] += size
            most[0], at_once[0] = max(most[0], held[0]), at_once[0] + 1
        try:
            threading.Event().wait(0.01)  # so that others may come in between
            return decoded(opened, draft_px)
        finally:
            with lock:
                held[0] -= size

    monkeypatch.setattr(module.Opened, "decoded", counted)
    sides = [200 if n % 3 == 0 else 20 + n for n in range(40)]
    images = pa.table({"bytes": [encoded("PNG", side=side) for side in sides]})
    results = list(loader(max_pixels=200 * 200, threads=8).load(images, 16))
    assert [picture.height for picture in results if isinstance(picture, DecodedImage)] == sides
    assert at_once[0] == 40
    assert most[0] <= 11.5 * 200 * 200
    assert most[0] > 8 * 200 * 200  # a small one beside a large one
