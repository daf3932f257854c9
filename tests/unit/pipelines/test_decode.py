"""Pictures, good and bad: every bad one ends as a refusal with its reason, every good one looks as people see it."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, features
from support import AS_IT_IS

from clipray.errors import SchemaError
from clipray.models.preprocess import Preprocess
from clipray.pipelines import decode as decode_module
from clipray.pipelines.decode import DecodedImage, decode, load_image, prepare_pillow
from clipray.pipelines.spec import Limits
from clipray.tables import check, rejects_schema, table_schema
from clipray.tables.reasons import Reason, Rejected, Stage, http_reason

LIMITS = Limits(schemes=("file", "http", "https", "s3", "memory"))
HEIGHT, WIDTH = 40, 60
PIXELS = np.random.default_rng(7).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
NOISE = Image.fromarray(PIXELS)
ORIENTATION = 0x0112


@pytest.fixture(autouse=True, scope="module")
def _pillow() -> None:
    prepare_pillow()


def encoded(kind: str, image: Image.Image = NOISE, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, idat: bytes, *, colour: int = 2, extra: bytes = b"") -> bytes:
    """A PNG made by hand, so that its header may lie."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", idat) + chunk(b"IEND", b"")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def zipped(data: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("picture.jpg", data)
    return sink.getvalue()


def load(uri: str | None = None, data: bytes | None = None, limits: Limits = LIMITS, **options: object):
    return load_image(uri, data, limits, AS_IT_IS, **options)


def pixels(data: bytes, **options: object) -> np.ndarray:
    return np.asarray(decode(data, LIMITS, **options))


JPEG = encoded("JPEG", quality=90)
PNG = encoded("PNG")
TIFF_LZW = encoded("TIFF", compression="tiff_lzw")
WEBP = encoded("WEBP")
AVIF = encoded("AVIF") if features.check("avif") else None
SCAN = JPEG.index(b"\xff\xda")
IDAT = PNG.index(b"IDAT")

# name -> (content, stage, reason); each is tried as a file and as inline bytes
BAD: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "fetch", "empty"),
    "text": (b"a picture of a hen\n", "decode", "not_an_image"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "decode", "not_an_image"),
    "json": (json.dumps({"error": "no such key"}).encode(), "decode", "not_an_image"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "decode", "not_an_image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "decode", "not_an_image"),
    "pdf": (b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n%%EOF\n", "decode", "not_an_image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "decode", "not_an_image"),
    "random bytes": (np.random.default_rng(3).bytes(2_000), "decode", "not_an_image"),
    "zeros": (bytes(2_000), "decode", "not_an_image"),
    "zip": (zipped(JPEG), "decode", "not_an_image"),
    "gzip of a JPEG": (gzip.compress(JPEG), "decode", "not_an_image"),
    "MP4": (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(200), "decode", "not_an_image"),
    "MPEG": (b"\0\0\x01\xb3\x01\0\x10" + bytes(200), "decode", "not_an_image"),
    "WAV": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(28), "decode", "not_an_image"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(200), "decode", "not_an_image"),
    "Parquet": (b"PAR1" + bytes(50) + b"PAR1", "decode", "not_an_image"),
    "git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "decode", "not_an_image"),
    "JPEG, only SOI": (JPEG[:2], "decode", "undecodable"),
    "JPEG, cut in a header": (JPEG[:100], "decode", "truncated"),
    "JPEG, cut before the scan": (JPEG[: SCAN + 4], "decode", "truncated"),
    "JPEG, cut in the scan": (JPEG[: (SCAN + len(JPEG)) // 2], "decode", "truncated"),
    "JPEG, tail overwritten by nothing": (JPEG[:-200], "decode", "truncated"),
    "PNG, only the signature": (PNG[:8], "decode", "undecodable"),
    "PNG, cut in the header": (PNG[:20], "decode", "truncated"),
    "PNG, cut in IDAT": (PNG[: len(PNG) // 2], "decode", "truncated"),
    "PNG, bad header CRC": (flipped(PNG, 30), "decode", "undecodable"),
    "PNG, pixels damaged": (flipped(PNG, IDAT + 200), "decode", "undecodable"),
    "PNG, no width": (png(0, 9, zlib.compress(b"")), "decode", "undecodable"),
    "PNG, too few pixels": (png(50, 50, zlib.compress(bytes(300))), "decode", "truncated"),
    "PNG, 20000 x 20000": (png(20_000, 20_000, zlib.compress(bytes(900))), "decode", "too_many_pixels"),
    "PNG, a bomb of 10001 x 10001": (png(10_001, 10_001, zlib.compress(bytes(10**6))), "decode", "too_many_pixels"),
    "PNG, a wide bomb": (png(2**31 - 1, 1, zlib.compress(bytes(900))), "decode", "too_many_pixels"),
    "GIF, cut in the header": (encoded("GIF")[:12], "decode", "undecodable"),
    "GIF, cut in the pixels": (encoded("GIF")[:2_000], "decode", "truncated"),
    "WEBP, only the header": (WEBP[:12], "decode", "truncated"),
    "WEBP, cut": (WEBP[: len(WEBP) // 2], "decode", "truncated"),
    "WEBP, damaged": (flipped(WEBP, 16), "decode", "undecodable"),
    "BMP, cut": (encoded("BMP")[:4_000], "decode", "truncated"),
    "BMP, only two letters": (b"BM", "decode", "undecodable"),
    "TIFF, cut in the pixels": (encoded("TIFF")[:4_000], "decode", "truncated"),
    "TIFF, cut before its directory": (TIFF_LZW[:-200], "decode", "undecodable"),
    "PPM, cut": (encoded("PPM")[:4_000], "decode", "truncated"),
    "JPEG 2000, cut": (encoded("JPEG2000")[:4_000], "decode", "undecodable"),
    "inline, too many bytes": (JPEG + bytes(70_000), "fetch", "too_many_bytes"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["file", "bytes"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_has_its_reason(name: str, how: str, tmp_path: Path) -> None:
    content, stage, reason = BAD[name]
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    limits = replace(LIMITS, max_bytes=70_000)
    found = load(str(path), None, limits) if how == "file" else load(None, content, limits)
    assert isinstance(found, Rejected)
    assert (found.stage, found.reason) == (stage, reason), found.message
    assert found.message
    assert "\n" not in found.message


def test_the_corpus_is_large() -> None:
    assert len(BAD) >= 30


def test_broken_avif_is_a_broken_picture() -> None:
    if AVIF is None:
        pytest.skip("this Pillow has no AVIF")
    assert [load(data=AVIF[:n]).reason for n in (30, len(AVIF) - 5)] == ["undecodable", "truncated"]


PHOTO = np.kron(np.arange(48).reshape(6, 8) * 5, np.ones((16, 16))).astype(np.uint8)


def test_heic_is_read_by_a_package_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "HEIF" in decode_module._formats()
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    image = Image.fromarray(np.stack([PHOTO, PHOTO // 2, 255 - PHOTO], axis=2))
    data = encoded("HEIF", image, quality=95, exif=turned.tobytes())
    upright = np.rot90(PHOTO, -1)
    difference = pixels(data).astype(int) - np.stack([upright, upright // 2, 255 - upright], axis=2)
    assert np.abs(difference).mean() < 4
    assert load(data=data[: len(data) // 2]).reason in ("truncated", "undecodable")
    assert load(data=data, limits=replace(LIMITS, max_pixels=1_000)).reason == "too_many_pixels"
    without = tuple(name for name in decode_module._formats() if name != "HEIF")
    monkeypatch.setattr(decode_module, "_formats", lambda: without)
    rejected = load(data=data)
    assert (rejected.stage, rejected.reason) == ("decode", "undecodable")
    assert 'pip install "clipray[heif]"' in rejected.message


def test_the_pixel_limit_is_the_jobs_own() -> None:
    huge = png(20_000, 10_000, zlib.compress(bytes(900)), colour=0)  # 200 MP: Pillow's own limit would be an error
    assert load(data=huge, limits=replace(LIMITS, max_pixels=200_000_000)).reason == "truncated"
    assert load(data=huge, limits=replace(LIMITS, max_pixels=199_999_999)).reason == "too_many_pixels"
    at_limit = replace(LIMITS, max_pixels=HEIGHT * WIDTH)
    assert isinstance(load(data=PNG, limits=at_limit), DecodedImage)
    assert load(data=PNG, limits=replace(at_limit, max_pixels=HEIGHT * WIDTH - 1)).reason == "too_many_pixels"


def test_the_limit_of_one_job_is_not_that_of_the_next() -> None:
    assert load(data=PNG, limits=replace(LIMITS, max_pixels=HEIGHT * WIDTH // 3)).reason == "too_many_pixels"
    assert isinstance(load(data=PNG, limits=LIMITS), DecodedImage)


def test_the_byte_limit_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    exact = replace(LIMITS, max_bytes=len(PNG))
    below = replace(LIMITS, max_bytes=len(PNG) - 1)
    assert isinstance(load(str(path), None, exact), DecodedImage)
    assert isinstance(load(None, PNG, exact), DecodedImage)
    assert load(str(path), None, below).reason == "too_many_bytes"
    assert load(None, PNG, below).reason == "too_many_bytes"


def _missing(folder: Path) -> str:
    return str(folder / "nothing.jpg")


def _directory(folder: Path) -> str:
    (folder / "pictures.jpg").mkdir()
    return str(folder / "pictures.jpg")


def _fifo(folder: Path) -> str:
    os.mkfifo(folder / "pipe.jpg")
    return str(folder / "pipe.jpg")


def _dangling(folder: Path) -> str:
    (folder / "link.jpg").symlink_to(folder / "gone.jpg")
    return str(folder / "link.jpg")


def _symlink_loop(folder: Path) -> str:
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    return str(folder / "loop.jpg")


def _unreadable(folder: Path) -> str:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = folder / "secret.jpg"
    path.write_bytes(JPEG)
    path.chmod(0)
    return str(path)


PLACES: list[tuple[Callable[[Path], str], str]] = [
    (_missing, "not_found"),
    (_directory, "not_a_file"),
    (_fifo, "not_a_file"),
    (_dangling, "not_found"),
    (_symlink_loop, "not_found"),
    (_unreadable, "forbidden"),
    (lambda folder: f"file://{_missing(folder)}", "not_found"),
    (lambda folder: "/dev/zero", "not_a_file"),
    (lambda folder: f"{folder}/nul\0.jpg", "invalid_uri"),
    (lambda folder: f"{folder}/{'a' * 300}.jpg", "not_found"),
    (lambda folder: "data:image/png;base64,iVBORw0KGgo=", "not_found"),
    (lambda folder: "python:print", "not_found"),
    (lambda folder: "memory://nowhere/a.jpg", "not_found"),
    (lambda folder: "http://", "invalid_uri"),
    (lambda folder: "ftp://example.invalid/a.jpg", "scheme_not_allowed"),
    (lambda folder: "FILE:///nowhere.jpg", "not_found"),
    (lambda folder: "python://os", "scheme_not_allowed"),
    (lambda folder: "://a.jpg", "scheme_not_allowed"),
    (lambda folder: f"zip://a.jpg::file://{folder}/a.zip", "scheme_not_allowed"),
    (lambda folder: f"file://a.jpg::file://{folder}/a.zip", "scheme_not_allowed"),
    (lambda folder: f"simplecache::file://{folder}/a.jpg", "scheme_not_allowed"),
]


@pytest.mark.parametrize("number", range(len(PLACES)))
def test_a_place_without_a_picture_has_its_reason(number: int, tmp_path: Path) -> None:
    place, reason = PLACES[number]
    found = load(place(tmp_path))
    assert isinstance(found, Rejected)
    assert (found.stage, found.reason) == ("fetch", reason), found.message


@pytest.mark.parametrize("uri", [None, ""])
def test_a_row_without_a_source(uri: str | None) -> None:
    found = load(uri, None)
    assert (found.stage, found.reason) == ("manifest", "no_source")


def test_a_scheme_that_the_job_does_not_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    assert load(str(path), limits=Limits(schemes=("s3",))).reason == "scheme_not_allowed"
    assert load(f"file://{path}", limits=Limits(schemes=("s3",))).reason == "scheme_not_allowed"
    assert isinstance(load(f"file://{path}"), DecodedImage)


@pytest.mark.parametrize("name", ["plain.png", "with space.png", "ü#%20?.png", "a::b.png", "c:d.png", "[1]*.png"])
def test_any_local_file_name_is_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(PNG)
    assert np.array_equal(load(str(tmp_path / name)).pixels, PIXELS)


def test_a_preprocessing_that_fails_is_a_refusal() -> None:
    def fails(_image: Image.Image, _height: int, _width: int) -> np.ndarray:
        raise ZeroDivisionError("no such thing")

    found = load_image(None, PNG, LIMITS, Preprocess(fails, AS_IT_IS.scratch_bytes))
    assert (found.stage, found.reason) == ("decode", "undecodable")
    assert "no such thing" in found.message


def test_the_schema_and_the_code_know_the_same_reasons() -> None:
    values = {c["name"]: c.get("values") for c in table_schema("rejects")["columns"]}
    assert values["reason"] == list(get_args(Reason))
    assert values["stage"] == list(get_args(Stage))


def test_reasons_that_carry_a_status_are_of_the_closed_set() -> None:
    def rows(*reasons: str) -> pa.Table:
        stage, message = (["fetch"] * len(reasons), ["said"] * len(reasons))
        return pa.table({"stage": stage, "reason": list(reasons), "message": message}, schema=rejects_schema())

    check("rejects", rows("empty", http_reason(404), http_reason(503)), rejects_schema())
    for reason in ("http_600", "http_4041", "http_", "xhttp_404", "gone"):
        with pytest.raises(SchemaError, match=reason):
            check("rejects", rows("empty", reason), rejects_schema())


# --- as people see it


def upright() -> np.ndarray:
    """A picture of 4 x 6 px whose every pixel is another colour."""
    y, x = np.mgrid[0:4, 0:6]
    return np.stack([40 * x, 60 * y, 10 * (x + y)], axis=-1).astype(np.uint8)


# EXIF orientation -> how a camera stores the upright picture: (the 0th row is, the 0th column is), EXIF 2.32, 4.6.4 A
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.transpose(1, 0, 2),  # left, top
    6: lambda a: a.transpose(1, 0, 2)[::-1],  # right, top
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright())))
    data = encoded(kind, stored, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    for draft_px in (None, 2):
        picture = load(data=data, draft_px=draft_px)
        assert np.array_equal(picture.pixels, upright())
        assert (picture.height, picture.width) == (4, 6)


@pytest.mark.parametrize("orientation", STORED)
def test_orientation_of_a_jpeg(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    large = upright().repeat(64, axis=0).repeat(64, axis=1)  # 256 x 384 px, flat blocks that JPEG keeps
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](large)))
    data = encoded("JPEG", stored, exif=exif, quality=100, subsampling=0)
    exact = load(data=data)
    assert np.abs(exact.pixels.astype(int) - large).max() <= 3
    fast = load(data=data, draft_px=128)
    assert (fast.height, fast.width) == (exact.height, exact.width) == (256, 384)
    assert fast.pixels.shape == (128, 192, 3)
    small = upright().repeat(32, axis=0).repeat(32, axis=1)
    assert np.abs(fast.pixels.astype(int) - small).max() <= 3


def tiff_block(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block of (tag, type, count, value or offset) as they come, however wrong."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


DAMAGED = {
    "cut": b"Exif\0\0MM",
    "noise": b"Exif\0\0" + np.random.default_rng(1).bytes(60),
    "directory outside": b"Exif\0\0II*\0\xff\xff\xff\xff",
    "directory too long": b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
    "no such orientation": tiff_block((ORIENTATION, 3, 1, b"\x09\0\0\0")),
    "orientation 0": tiff_block((ORIENTATION, 3, 1, bytes(4))),
    "value outside": tiff_block((0x010F, 2, 1_000, b"\xff\xff\xff\x7f")),
    "no such type": tiff_block((0x010F, 99, 1, bytes(4))),
}


@pytest.mark.parametrize("draft_px", [None, 8])
@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_is_ignored(name: str, draft_px: int | None) -> None:
    plain = load(data=JPEG, draft_px=draft_px)
    picture = load(data=encoded("JPEG", quality=90, exif=DAMAGED[name]), draft_px=draft_px)
    assert isinstance(picture, DecodedImage)
    assert np.array_equal(picture.pixels, plain.pixels)
    assert (picture.height, picture.width) == (HEIGHT, WIDTH)


@pytest.mark.filterwarnings("ignore")
def test_orientation_counts_beside_a_damaged_tag() -> None:
    exif = tiff_block((0x010F, 2, 1_000, b"\xff\xff\xff\x7f"), (ORIENTATION, 3, 1, b"\x06\0\0\0"))
    picture = load(data=encoded("JPEG", exif=exif))
    assert (picture.height, picture.width) == (WIDTH, HEIGHT)


def test_plain_rgb_is_left_alone() -> None:
    assert np.array_equal(pixels(PNG), PIXELS)
    assert np.array_equal(pixels(encoded("BMP")), PIXELS)
    assert np.array_equal(pixels(TIFF_LZW), PIXELS)
    assert np.array_equal(pixels(encoded("WEBP", lossless=True)), PIXELS)


def test_cmyk_jpeg() -> None:
    inks = np.zeros((16, 64, 4), np.uint8)
    inks[:, 16:32, 0] = 255  # cyan
    inks[:, 32:48, 1:3] = 255  # magenta and yellow: red
    inks[:, 48:, 3] = 255  # black
    found = pixels(encoded("JPEG", Image.fromarray(inks, "CMYK"), quality=100, subsampling=0))
    colours = [(255, 255, 255), (0, 255, 255), (255, 0, 0), (0, 0, 0)]
    for column, colour in zip((8, 24, 40, 56), colours, strict=True):
        assert np.abs(found[8, column].astype(int) - colour).max() <= 4


def test_grey_jpeg_has_three_equal_channels() -> None:
    grey = np.arange(0, 256, 4, dtype=np.uint8).reshape(1, 64).repeat(64, axis=0)
    found = pixels(encoded("JPEG", Image.fromarray(grey), quality=100))
    assert found.shape == (64, 64, 3)
    assert np.array_equal(found[..., 0], found[..., 1])
    assert np.array_equal(found[..., 0], found[..., 2])
    assert np.abs(found[..., 0].astype(int) - grey).max() <= 3


def deep() -> np.ndarray:
    return (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    found = pixels(encoded(kind, Image.fromarray(deep())))
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(found, expected[..., None].repeat(3, axis=-1))


def test_16_bit_grey_between_two_values_is_rounded() -> None:
    values = np.array([[0, 128, 129, 385, 386, 65_535 - 129, 65_535 - 128]], np.uint16)
    expected = [0, 0, 1, 1, 2, 254, 255]  # 128/257 < 0.5 < 129/257, and so on
    assert pixels(encoded("PNG", Image.fromarray(values)))[0, :, 0].tolist() == expected


def test_big_endian_16_bit_tiff() -> None:
    found = pixels(encoded("TIFF", Image.fromarray(deep().astype(">u2"))))
    assert np.array_equal(found[..., 0].ravel(), np.arange(256))


def test_16_bit_grey_with_a_transparent_value_is_on_white() -> None:
    data = encoded("PNG", Image.fromarray(deep()))
    at = data.index(b"IDAT") - 4
    found = pixels(data[:at] + chunk(b"tRNS", struct.pack(">H", 5 * 257)) + data[at:])
    expected = np.arange(256)
    expected[5] = 255
    assert np.array_equal(found[..., 0].ravel(), expected)


def test_float_tiff_of_0_to_1_and_of_0_to_255() -> None:
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    for scale in (1, 255):
        found = pixels(encoded("TIFF", Image.fromarray(values * np.float32(scale))))
        assert np.array_equal(found[..., 1].ravel(), np.arange(256))


def test_float_tiff_with_nan_and_out_of_range() -> None:
    values = np.array([[0, 300, -7, np.nan, 100]], np.float32)
    assert pixels(encoded("TIFF", Image.fromarray(values)))[0, :, 0].tolist() == [0, 255, 0, 0, 100]


def test_32_bit_grey_tiff() -> None:
    values = np.array([[0, 257, 65_535]], np.int32)
    assert pixels(encoded("TIFF", Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 255]


def test_1_bit() -> None:
    bits = np.indices((9, 13)).sum(axis=0) % 2 == 0
    for kind in ("PNG", "TIFF", "BMP"):
        found = pixels(encoded(kind, Image.fromarray(bits)))
        assert np.array_equal(found, (bits * 255).astype(np.uint8)[..., None].repeat(3, axis=-1))


def palette() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0, 7, 8, 9])
    return image


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette(kind: str) -> None:
    assert pixels(encoded(kind, palette()))[0].tolist() == [[10, 20, 30], [200, 100, 50], [0, 0, 0], [7, 8, 9]]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_a_transparent_colour_is_on_white(kind: str) -> None:
    found = pixels(encoded(kind, palette(), transparency=2))
    assert found[0].tolist() == [[10, 20, 30], [200, 100, 50], [255, 255, 255], [7, 8, 9]]


def test_palette_with_half_transparent_colours_is_on_white() -> None:
    found = pixels(encoded("PNG", palette(), transparency=bytes([255, 128, 0, 255])))
    mixed = [round((c * 128 + 255 * 127) / 255) for c in (200, 100, 50)]
    assert np.abs(found[0].astype(int) - [[10, 20, 30], mixed, [255] * 3, [7, 8, 9]]).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_rgba_is_on_white(kind: str) -> None:
    colours = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 128], [0, 0, 0, 51]]], np.uint8)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = pixels(encoded(kind, Image.fromarray(colours), **options))[0].astype(float)
    alpha = colours[0, :, 3:] / 255
    assert np.abs(found - (colours[0, :, :3] * alpha + 255 * (1 - alpha))).max() <= 1


def test_grey_with_alpha_is_on_white() -> None:
    image = Image.fromarray(np.array([[[90, 255], [90, 0], [90, 102]]], np.uint8), "LA")
    found = pixels(encoded("PNG", image))[0]
    assert np.abs(found[:, 0].astype(int) - [90, 255, 189]).max() <= 1  # 90 * 0.4 + 255 * 0.6
    assert np.array_equal(found[:, 0], found[:, 2])


def test_rgb_png_with_a_transparent_colour_is_on_white() -> None:
    values = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    found = pixels(encoded("PNG", Image.fromarray(values), transparency=(1, 2, 3)))
    assert found[0].tolist() == [[255, 255, 255], [4, 5, 6]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (12, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(kind, frames[0], save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.array_equal(pixels(data), np.asarray(frames[0]))


def photo(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return Image.fromarray((np.stack([y, x, (x + y) / 2], axis=-1) * 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("height", "width", "draft_px", "decoded"),
    [
        (1200, 1600, 448, (600, 800)),
        (1200, 1600, 150, (150, 200)),
        (1200, 1600, 151, (300, 400)),
        (1200, 1600, 1201, (1200, 1600)),
        (301, 4000, 100, (151, 2000)),
        (40, 60, 448, (40, 60)),
    ],
)
def test_fast_decoding_keeps_the_size_and_enough_pixels(
    height: int, width: int, draft_px: int, decoded: tuple[int, int]
) -> None:
    picture = load(data=encoded("JPEG", photo(height, width)), draft_px=draft_px)
    assert (picture.height, picture.width) == (height, width)
    assert picture.pixels.shape[:2] == decoded
    assert min(decoded) >= min(draft_px, height, width)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_fast_decoding_shows_the_same_picture(mode: str) -> None:
    data = encoded("JPEG", photo(512, 768).convert(mode), quality=95)
    fast = pixels(data, draft_px=200)
    exact = Image.fromarray(pixels(data)).resize((fast.shape[1], fast.shape[0]), Image.Resampling.BOX)
    assert np.abs(fast.astype(int) - np.asarray(exact)).max() <= 6


def test_fast_decoding_of_other_formats_is_exact() -> None:
    for kind in ("PNG", "WEBP", "BMP", "GIF"):
        data = encoded(kind)
        assert np.array_equal(pixels(data, draft_px=8), pixels(data))
