"""PNGs with large texts and profiles: the same pixels, in bounded memory."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clipray.pipelines.decode import decode
from clipray.pipelines.png_metadata import LARGEST_BYTES, without_large_metadata
from clipray.pipelines.spec import Limits

PIXELS = np.random.default_rng(5).integers(0, 256, (9, 13, 3), dtype=np.uint8)
ROTATED = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="3"/></rdf:RDF></x:xmpmeta>'
)


def png(info: PngInfo | None = None) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(PIXELS).save(sink, "PNG", pnginfo=info)
    return sink.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def with_chunks(*chunks: bytes, at_end: bool = False) -> bytes:
    """Behind the header, or in front of the end."""
    data = png()
    at = len(data) - 12 if at_end else 33
    return data[:at] + b"".join(chunks) + data[at:]


def ztxt(key: bytes, text: bytes) -> bytes:
    return chunk(b"zTXt", key + b"\0\0" + zlib.compress(text))


def itxt(key: bytes, text: bytes) -> bytes:
    return chunk(b"iTXt", key + b"\0\1\0en\0key\0" + zlib.compress(text))


def iccp(profile: bytes) -> bytes:
    return chunk(b"iCCP", b"profile\0\0" + zlib.compress(profile))


LARGE = bytes(LARGEST_BYTES + 1)
CHUNKS = {
    "zTXt": ztxt(b"prompt", LARGE),
    "iTXt": itxt(b"workflow", LARGE),
    "iCCP": iccp(LARGE),
    "tEXt": chunk(b"tEXt", b"k\0" + LARGE.replace(b"\0", b"x")),
}


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("name", CHUNKS)
def test_a_png_with_large_metadata_shows_its_pixels(name: str, at_end: bool) -> None:
    data = with_chunks(CHUNKS[name], at_end=at_end)
    assert without_large_metadata(data) == png()
    assert np.array_equal(np.asarray(decode(data, Limits())), PIXELS)


def test_pillow_alone_refuses_it() -> None:
    """Else there is no need for any of this."""
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(io.BytesIO(with_chunks(CHUNKS["zTXt"])))


def test_bytes_that_need_no_change_are_the_same_object() -> None:
    small = with_chunks(ztxt(b"a", b"text"), itxt(b"b", b"text"), iccp(b"profile"), chunk(b"tEXt", b"k\0v"))
    largest = with_chunks(ztxt(b"a", bytes(LARGEST_BYTES)))
    jpeg = b"\xff\xd8\xff" + CHUNKS["zTXt"]
    damaged = with_chunks(chunk(b"zTXt", b"no end"), chunk(b"iCCP", b"p\0\0no deflate"), chunk(b"iTXt", b"k\0\1"))
    cut = with_chunks(CHUNKS["zTXt"])[:200]
    for data in (png(), small, largest, jpeg, damaged, cut, b"", png()[:8]):
        assert without_large_metadata(data) is data


def test_an_orientation_among_large_metadata_counts() -> None:
    info = PngInfo()
    info.add_text("prompt", "x" * len(LARGE), zip=True)
    info.add_itxt("XML:com.adobe.xmp", ROTATED)
    assert np.array_equal(np.asarray(decode(png(info), Limits())), PIXELS[::-1, ::-1])


def test_a_bomb_takes_little_memory() -> None:
    """1 MB that would inflate to 1 GB, once as one text, once as a thousand."""
    megabyte = zlib.compress(bytes(2**20), 9)
    one = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**28), 9))
    for bomb in (with_chunks(one), with_chunks(*[chunk(b"zTXt", b"k%d\0\0" % n + megabyte) for n in range(900)])):
        tracemalloc.start()
        image = decode(bomb, Limits())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert np.array_equal(np.asarray(image), PIXELS)
        assert peak < 32 * 2**20
