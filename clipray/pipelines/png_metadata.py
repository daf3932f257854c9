"""PNG without the texts and colour profiles that would take more memory than an image's pixels, and that nobody asks for."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST_BYTES = 2**20  # of one inflated text or profile; Pillow refuses an image with a larger one
TOTAL_BYTES = 8 * 2**20  # of all of them, inflated
FRAME_BYTES = 12  # of a chunk: length, name and checksum around its data


def without_large_metadata(data: bytes) -> bytes:
    """`data` itself, unless it is a PNG whose texts (tEXt, zTXt, iTXt) or profile (iCCP) are large: then without those.

    Small ones stay: a text may hold the orientation. At most TOTAL_BYTES and one LARGEST_BYTES are inflated, a chunk at a time.
    A damaged chunk stays, for the decoder to judge.
    """
    if not data.startswith(SIGNATURE):
        return data
    room, dropped = TOTAL_BYTES, []
    for name, start, end in _chunks(data):
        if name in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            size = _inflated_bytes(name, data[start:end]) if room > 0 else LARGEST_BYTES + 1
            if size > LARGEST_BYTES:
                dropped.append((start - 8, end + 4))
            room -= size
    return _without(data, dropped) if dropped else data


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, and where the data of each whole chunk begins and ends."""
    position = len(SIGNATURE)
    while position + FRAME_BYTES <= len(data):
        length, name = int.from_bytes(data[position : position + 4]), data[position + 4 : position + 8]
        start, position = position + 8, position + FRAME_BYTES + length
        if position > len(data):
            return
        yield name, start, start + length


def _inflated_bytes(name: bytes, content: bytes) -> int:
    """Of a chunk's text or profile; LARGEST_BYTES + 1 where it is larger."""
    compressed = _compressed(name, content)
    if compressed is None:
        return min(len(content), LARGEST_BYTES + 1)
    try:
        return len(zlib.decompressobj().decompress(compressed, LARGEST_BYTES + 1))
    except zlib.error:
        return 0


def _compressed(name: bytes, content: bytes) -> bytes | None:
    """The deflated part of a chunk, or None where nothing is deflated."""
    _, _, rest = content.partition(b"\0")  # behind the keyword
    if name in (b"zTXt", b"iCCP"):
        return rest[1:]  # behind the method
    if name == b"iTXt" and rest[:1] not in (b"", b"\0"):  # flag, method, language, translated keyword
        return rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    return None


def _without(data: bytes, spans: list[tuple[int, int]]) -> bytes:
    starts, ends = zip(*spans, strict=True)
    kept = zip((0, *ends), (*starts, len(data)), strict=True)
    return b"".join(data[start:end] for start, end in kept)
