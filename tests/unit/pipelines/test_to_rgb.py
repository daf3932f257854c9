"""Images of every mode in RGB: the same as by Pillow at once, tile by tile; deep greys by what their files say."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipray.pipelines import to_rgb as module
from clipray.pipelines.decode import decode
from clipray.pipelines.spec import Limits
from clipray.pipelines.to_rgb import GreyType, to_rgb, white_of
from clipray.tables.reasons import Rejected

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
MAX_SAMPLE, S_MAX_SAMPLE = 281, 341


def at_once(image: Image.Image) -> Image.Image:
    """Of images that are no deep greys: Pillow's own, all pixels together."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(
            canvas, (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        ).convert("RGB")
    return image.convert("RGB")


def images() -> dict[str, Image.Image]:
    rgba = Image.fromarray(np.random.default_rng(2).integers(0, 256, (13, 17, 4), dtype=np.uint8))
    made = {
        mode: rgba.convert(mode) for mode in ("RGBA", "RGB", "L", "LA", "1", "P", "PA", "CMYK", "YCbCr", "HSV", "RGBa")
    }
    made["La"] = made["LA"].convert("La")
    made["LAB"] = Image.frombytes("LAB", (17, 13), made["RGB"].tobytes())
    for name, mode, transparency in [
        ("RGB, a colour", "RGB", made["RGB"].getpixel((4, 5))),
        ("L, a grey", "L", made["L"].getpixel((4, 5))),
        ("P, a colour", "P", made["P"].getpixel((4, 5))),
        ("P, of each colour", "P", bytes(range(256))),
    ]:
        made[name] = made[mode].copy()
        made[name].info["transparency"] = transparency
    return made


@pytest.mark.parametrize("tile_pixels", [1, 7, 17, 40, 2**20])
@pytest.mark.parametrize("name", images())
def test_tiles_are_the_same_as_all_at_once(name: str, tile_pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_PIXELS", tile_pixels)
    image = images()[name]
    found, expected = to_rgb(image.copy()), at_once(image)
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_tiles_of_a_deep_grey_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).integers(0, 65_536, (13, 17), dtype=np.uint16)
    for image in (
        Image.fromarray(values),
        Image.fromarray(values.astype(np.float32)),
        Image.fromarray(values.astype(np.int32)),
    ):
        for tile_pixels in (1, 20, 2**20):
            monkeypatch.setattr(module, "TILE_PIXELS", tile_pixels)
            assert np.array_equal(np.asarray(to_rgb(image))[..., 2], (values / 257).round().astype(np.uint8))


def tiff(samples: np.ndarray, *, bits: int | None = None, white_is_zero: bool = False, **tags: float) -> bytes:
    """A TIFF of one strip, by hand: Pillow writes neither all of these types nor these tags. `tags`: t281=4095."""
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    data = samples.tobytes()
    height, width = samples.shape
    entries = [
        (256, 4, width), (257, 4, height), (258, 3, bits or 8 * samples.dtype.itemsize), (259, 3, 1), (262, 3, int(not white_is_zero)),
        (273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, kind),
        *((int(name[1:]), 11 if kind == 3 or value != int(value) else 4, value) for name, value in tags.items()),
    ]  # fmt: skip
    codes = {3: "<HHIHxx", 4: "<HHII", 11: "<HHIf"}
    body = b"".join(struct.pack(codes[code], tag, code, 1, value) for tag, code, value in sorted(entries))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries)) + body + bytes(4)


def shown(data: bytes) -> np.ndarray:
    pixels = np.asarray(decode(data, Limits()))
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    return pixels[..., 1]


def refusal(data: bytes) -> str:
    with pytest.raises(Rejected) as refused:
        decode(data, Limits())
    assert (refused.value.stage, refused.value.reason) == ("decode", "undecodable")
    return refused.value.message


U2, I2, U4, I4, F4 = (np.dtype(name) for name in ("<u2", "<i2", "<u4", "<i4", "<f4"))
WIDE = GREY.astype(np.int64)
SAME: dict[str, bytes] = {
    "uint16": tiff((WIDE * 257).astype(U2)),
    "uint16, white is zero": tiff((65_535 - WIDE * 257).astype(U2), white_is_zero=True),
    "uint16 of 12 bits, as a tag says": tiff((WIDE * 4_095 / 255).round().astype(U2), t281=4_095),
    "uint16 of 8 bits, as a tag says": tiff(WIDE.astype(U2), t281=255),
    "uint16 of 12 bits, as the other tag says": tiff((WIDE * 4_095 / 255).round().astype(U2), t341=4_095),
    "uint16, its tag a statistic": tiff((WIDE * 257).astype(U2), t281=60_000),
    "uint16, its tag exceeded": tiff((WIDE * 257).astype(U2), t281=4_095),
    "int16 to 255": tiff(WIDE.astype(I2)),
    "int16 to 32767": tiff((WIDE * 32_767 / 255).round().astype(I2)),
    "uint32 to 255": tiff(WIDE.astype(U4)),
    "uint32 to 65535": tiff((WIDE * 257).astype(U4)),
    "uint32 to 4294967295": tiff((WIDE * 16_843_009).astype(U4)),
    "int32 to 255": tiff(WIDE.astype(I4)),
    "int32 to 65535": tiff((WIDE * 257).astype(I4)),
    "int32 to 2147483647": tiff((WIDE * (2**31 - 1) / 255).round().astype(I4)),
    "int32 of 12 bits, as a tag says": tiff((WIDE * 4_095 / 255).round().astype(I4), t281=4_095),
    "float to 1": tiff((WIDE / 255).astype(F4)),
    "float to 255": tiff(WIDE.astype(F4)),
    "float to 65535": tiff((WIDE * 257).astype(F4)),
    "float to 1, white is zero": tiff((1 - WIDE / 255).astype(F4), white_is_zero=True),
    "float to 1023, as a tag says": tiff((WIDE * 1_023 / 255).astype(F4), t341=1_023),
}


@pytest.mark.parametrize("name", SAME)
def test_deep_greys_of_one_image_look_alike(name: str) -> None:
    assert np.array_equal(shown(SAME[name]), GREY)


def test_12_packed_bits_are_scaled() -> None:
    """Two samples in three bytes: 0x000, 0xfff, 0x800, 0x001."""
    data = tiff(np.frombuffer(bytes.fromhex("000fff800001"), np.uint8).reshape(1, 6), bits=12)
    data = data.replace(struct.pack("<HHII", 256, 4, 1, 6), struct.pack("<HHII", 256, 4, 1, 4))
    assert shown(data)[0].tolist() == [0, 255, round(0x800 * 255 / 4_095), 0]


def test_pgm_is_scaled_by_its_largest_value() -> None:
    for largest in (1_000, 4_095, 65_535):
        values = np.array([[0, largest // 2, largest, 200]], ">u2")
        expected = [0, 127, 255, round(200 * 255 / largest)]
        assert np.abs(shown(b"P5 4 1 %d\n" % largest + values.tobytes())[0].astype(int) - expected).max() <= 1


def test_a_16_bit_png_is_dark_where_its_values_are() -> None:
    sink = io.BytesIO()
    Image.fromarray((GREY // 4).astype(np.uint16) * 257).save(sink, "PNG")
    assert np.array_equal(shown(sink.getvalue()), GREY // 4)


UNCLEAR: dict[str, tuple[bytes, str]] = {
    "int32 to a million": (tiff(np.array([[0, 1_000_000]], I4)), "32-bit signed integers from 0 to 1e+06"),
    "int32 of 12 bits": (tiff(np.array([[0, 3_000]], I4)), "expected 0 to 255 or 65535 or 2.14748e+09"),
    "uint32 to 2000": (tiff(np.array([[0, 2_000]], U4)), "32-bit unsigned integers"),
    "int16 below black": (tiff(np.array([[-2_000, 30_000], [-30_000, 0]], I2)), "from -30000 to 30000"),
    "float to 10": (tiff(np.array([[0, 10]], F4)), "32-bit floats from 0 to 10"),
    "float to 1e9": (tiff(np.array([[0, 1e9]], F4)), "expected 0 to 1 or 255 or 65535"),
    "float from -1 to 1": (tiff(np.array([[-1, 1]], F4)), "from -1 to 1"),
    "nothing but NaN": (tiff(np.full((2, 2), np.nan, F4)), "no finite value"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_deep_grey_whose_white_is_unclear_is_rejected(name: str) -> None:
    data, words = UNCLEAR[name]
    assert words in refusal(data)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.0], [0, 0]),
        ([1.0, 1.0], [255, 255]),
        ([255.0, 255.0], [255, 255]),
        ([0.5, 0.5], [128, 128]),  # 127.5, to even
        ([-0.1, 1.2], [0, 255]),  # as resampling leaves them
        ([-20.0, 300.0], [0, 255]),
        ([np.nan, 0.2], [0, 51]),
        ([np.inf, 51.0], [255, 51]),
        ([-np.inf, 51.0], [0, 51]),
    ],
)
def test_floats_at_the_edges(values: list[float], expected: list[int]) -> None:
    assert shown(tiff(np.array([values], F4)))[0].tolist() == expected


def test_which_value_is_white() -> None:
    cases: list[tuple[Any, float, float, float]] = [
        (GreyType("u", 16), 0, 9, 65_535),
        (GreyType("u", 12), 0, 9, 4_095),
        (GreyType("u", 16, declared=4_095), 0, 4_095, 4_095),
        (GreyType("u", 16, declared=4_095), 0, 4_096, 65_535),
        (GreyType("u", 16, declared=1), 0, 1, 65_535),
        (GreyType("i", 32), 0, 1, 255),
        (GreyType("i", 32), 0, 4_096, 65_535),
        (GreyType("i", 16), 0, 2_048, 32_767),
        (GreyType("u", 32), 0, 2**28, 2**32 - 1),
        (GreyType("f", 32), 0, 1.25, 1),
        (GreyType("f", 32), -63, 318.75, 255),
        (GreyType("f", 32, declared=0.7), 0, 0.7, 1),
        (GreyType("f", 32, declared=float("nan")), 0, 0.7, 1),
    ]  # fmt: skip
    for grey, low, high, white in cases:
        assert white_of(grey, low, high) == white, grey
