"""The files in a tar, from its headers alone: ustar, pax, and GNU's long names. The data between the headers is skipped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from clipray.errors import ManifestError
from clipray.storage.folder import explained, filesystem
from clipray.storage.uris import is_local, parse

BLOCK_BYTES = 512  # of which a tar is made
LONGEST_NAME = 2**20  # in bytes; a longer one is damage
HEADER_BYTES = 32 * 2**10  # read at once from a server where headers are far apart
PIECE_BYTES = 8 * 2**20  # where they are not
NEAR_BYTES = 2**20  # between headers, which are read sooner than another request is answered
ZEROS = bytes(BLOCK_BYTES)

REGULAR, SPARSE, LONG_NAME, PAX, PAX_FOR_ALL = (b"0", b"\0", b"7"), b"S", b"L", b"x", b"g"
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders
COMPRESSIONS = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}  # fmt: skip


class Member(NamedTuple):
    """A regular file in a tar: its path there, and where its bytes are."""

    name: str
    offset: int
    size: int


class TarBytes(Protocol):
    """The bytes of a tar.

    Attributes:
        size: of the tar in bytes.
    """

    url: str
    size: int

    def read(self, offset: int, size: int) -> bytes:
        """These bytes; fewer at the end of the file."""


@contextlib.contextmanager
def open_tar(url: str, size: int) -> Iterator[TarBytes]:
    """The bytes of a tar at a path or URL. Raises OSError, StorageError."""
    if is_local(url):
        with open(parse(url)[1], "rb", buffering=0) as file:
            yield _LocalBytes(url, size, file.fileno())
    else:
        yield _RemoteBytes(url, size)


@dataclass
class _LocalBytes:
    url: str
    size: int
    file: int

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self.file, size, offset)


@dataclass
class _RemoteBytes:
    """Reads ahead: a little where the headers so far were far apart, else all that lies between them too."""

    url: str
    size: int
    _held: bytes = b""
    _start: int = 0  # of the bytes that are held
    _end: int = 0  # of what was read last
    _jumps: int = field(default=0)  # over more than is read ahead at least

    def read(self, offset: int, size: int) -> bytes:
        self._jumps += offset - self._end > HEADER_BYTES
        self._end = offset + size
        if not self._start <= offset <= offset + size <= self._start + len(self._held):
            near = offset > 0 and (not self._jumps or offset <= self._jumps * NEAR_BYTES)
            ahead = PIECE_BYTES if near else HEADER_BYTES
            self._held, self._start = self._fetch(offset, max(size, ahead)), offset
        return self._held[offset - self._start : offset - self._start + size]

    def _fetch(self, offset: int, size: int) -> bytes:
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        fs, path = filesystem(self.url)
        with explained(self.url):
            data: bytes = fs.cat_file(path, start=offset, end=offset + size)
        if len(data) > size:
            raise ManifestError(f"{self.url}: the server sends whole files only; expected one that sends parts of them")
        return data


def read_members(tar: TarBytes) -> Iterator[Member]:
    """The regular files of a tar, in its order. Links, folders and devices are left out.

    Raises:
        ManifestError: it is no tar, a compressed one, truncated or damaged, or a member is sparse.
        OSError, StorageError: it cannot be read.
    """
    if not tar.size:
        raise ManifestError(f"{tar.url}: no tar: 0 bytes")
    offset = 0
    common: dict[str, str] = {}  # pax records of all members that follow
    records: dict[str, str] = {}  # pax records of the next one
    while offset < tar.size:
        header = tar.read(offset, BLOCK_BYTES)
        if header == ZEROS:
            return
        size = _checked_size(tar, offset, header)
        data, flag = offset + BLOCK_BYTES, header[156:157]
        if flag in REGULAR:
            records = {**common, **records}
            size = _size_of(records.get("size"), size)
        offset = data if flag in WITHOUT_DATA else data + -(-size // BLOCK_BYTES) * BLOCK_BYTES
        if size < 0:
            raise ManifestError(f"{tar.url}: damaged: a member at byte {data} has {size} bytes")
        if data + size > tar.size and flag not in WITHOUT_DATA:
            raise ManifestError(f"{tar.url}: truncated: a member at byte {data} has {size} bytes, the tar {tar.size}")
        if flag in (LONG_NAME, PAX, PAX_FOR_ALL):
            (common if flag == PAX_FOR_ALL else records).update(_records(tar, flag, data, size))
            continue
        if flag == SPARSE or any(key.startswith("GNU.sparse.") for key in records):
            raise ManifestError(
                f"{tar.url}: member {_name(header, records)!r} is sparse: write the tar without --sparse"
            )
        name = _name(header, records)
        records = {}
        if flag in REGULAR and not name.endswith("/"):  # which old tars call folders
            yield Member(name, data, size)
    if records or offset > tar.size:  # writers that forget the end of a tar still end with a whole member
        raise ManifestError(f"{tar.url}: truncated: expected a member at byte {offset}, the tar has {tar.size}")


def _size_of(record: str | None, size: int) -> int:
    """The size in a pax record, or that of the header; -1 for a record that is no number."""
    if record is None:
        return size
    return int(record) if record.isascii() and record.isdigit() else -1


def _checked_size(tar: TarBytes, offset: int, header: bytes) -> int:
    """The size that a header names. Raises ManifestError: it is none."""
    with contextlib.suppress(ValueError):
        stored = _number(header[148:156])
        if len(header) == BLOCK_BYTES and stored in _checksums(header):
            return _number(header[124:136])
    if offset:
        what = "truncated" if len(header) < BLOCK_BYTES else "damaged"
        raise ManifestError(f"{tar.url}: {what}: expected the header of a member at byte {offset} of {tar.size}")
    raise ManifestError(f"{tar.url}: {_no_tar(header)}")


def _no_tar(first: bytes) -> str:
    compression = next((name for mark, name in COMPRESSIONS.items() if first.startswith(mark)), None)
    if compression:
        return f"compressed with {compression}, in which no image can be read alone: expected a plain tar"
    return f"no tar: it starts with {first[:8]!r}"


def _number(digits: bytes) -> int:
    """A number of a header: octal digits, or bytes where the first bit is set."""
    if digits[:1] and digits[0] & 0x80:
        return int.from_bytes(bytes([digits[0] & 0x7F]) + digits[1:])
    return int(digits.partition(b"\0")[0].strip() or b"0", 8)


def _checksums(header: bytes) -> Iterator[int]:
    """The sum of a header's bytes with blanks for the sum itself; and as some old tars have it, of signed ones."""
    counted = header[:148] + header[156:]
    total = sum(counted) + 8 * 32
    yield total
    yield total - 256 * sum(byte > 127 for byte in counted)


def _records(tar: TarBytes, flag: bytes, offset: int, size: int) -> dict[str, str]:
    """What a member says of the next one, by the names that pax has for it."""
    if size > LONGEST_NAME:
        raise ManifestError(f"{tar.url}: damaged: {size} bytes at byte {offset} to describe a member")
    data = tar.read(offset, size)
    if flag == LONG_NAME:
        return {"path": _text(data)}
    records = {}
    try:
        while data[:1].strip(b"\0"):
            length = int(data.partition(b" ")[0])
            key, _, value = data[:length].partition(b" ")[2].removesuffix(b"\n").partition(b"=")
            records[_text(key)] = _text(value)
            data = data[length:] if length > 0 else b""
    except ValueError as error:
        raise ManifestError(f"{tar.url}: damaged: expected pax records at byte {offset}") from error
    return records


def _name(header: bytes, records: Mapping[str, str]) -> str:
    if "path" in records:
        return records["path"]
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _text(raw: bytes) -> str:
    r"""Bytes up to the first null in UTF-8, with those that are not as `\xe9`."""
    return raw.partition(b"\0")[0].decode("utf-8", "backslashreplace")
