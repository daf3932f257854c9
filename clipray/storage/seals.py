"""Checksums that files contain of themselves: they show whether a file has changed since it was written.

A shard carries the SHA-256 of its own bytes in its Parquet metadata, a JSON file in its last field; while it is computed the
checksum's own place is filled with zeros. So a file can be verified from the moment that it is there, without its table's
record. Files that versions before have written carry none.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

KEY = "clipray.sha256"  # in the metadata of a Parquet file
BLANK = "0" * 64
CHUNK_BYTES = 2**23
_MARK = KEY.encode() + bytes([0x18, len(BLANK)])  # as Thrift's compact protocol writes the key and its value's length
_FIRST, _LAST = "sealed", "checksum"  # fields of a JSON file; no single flipped bit hits the names of both


def seal(parquet: io.BytesIO) -> str:
    """Fill in the checksum of a Parquet file that was written with `BLANK` under `KEY`.

    Returns:
        The SHA-256 of the finished file, 64 hex digits.
    """
    with parquet.getbuffer() as data:
        at = _mark_in(_footer(parquet), len(data))
        body, rest = hashlib.sha256(data[:at]), data[at + len(BLANK) :]
        sealed = body.copy()
        sealed.update(BLANK.encode())
        sealed.update(rest)
        data[at : at + len(BLANK)] = sealed.hexdigest().encode()
        body.update(data[at:])
        return body.hexdigest()


def file_hashes(file: io.BufferedIOBase) -> tuple[str, bool | None]:
    """The SHA-256 of a Parquet file, and whether it is the one that its seal says; None where it carries no seal."""
    at = _mark_in(_footer(file), file.seek(0, io.SEEK_END))
    file.seek(0)
    if at < 0:
        return file_hash(file), None
    whole = hashlib.sha256()
    for chunk in _chunks(file, at):
        whole.update(chunk)
    sealed, seal_here = whole.copy(), file.read(len(BLANK))
    whole.update(seal_here)
    sealed.update(BLANK.encode())
    for chunk in _chunks(file):
        whole.update(chunk)
        sealed.update(chunk)
    return whole.hexdigest(), seal_here == sealed.hexdigest().encode()


def _chunks(file: io.BufferedIOBase, size: int | None = None) -> Iterator[bytes]:
    left = CHUNK_BYTES if size is None else size
    while chunk := file.read(min(CHUNK_BYTES, left)):
        yield chunk
        left -= 0 if size is None else len(chunk)


def _footer(file: io.BufferedIOBase) -> bytes:
    """The end of a Parquet file, with its footer."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(8)[:4], "little") + 8
    file.seek(max(0, size - length))
    return file.read() if length <= size else b""


def _mark_in(footer: bytes, size: int) -> int:
    """Offset of the checksum in a file of `size` bytes; -1 if there is none."""
    at = footer.rfind(_MARK)
    return -1 if at < 0 else size - len(footer) + at + len(_MARK)


def file_hash(file: io.BufferedIOBase) -> str:
    """SHA-256 of a file of any kind, 64 hex digits."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def sealed_json(value: Mapping[str, Any]) -> bytes:
    """Plain values as JSON with the checksum of its own bytes."""
    text = json.dumps({_FIRST: "sha256", **value, _LAST: BLANK}, indent=2, ensure_ascii=False) + "\n"
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return checksum.join(text.rsplit(BLANK, 1)).encode()


def open_json(data: bytes) -> tuple[dict[str, Any], bool]:
    """The values that `sealed_json` wrote, and True; or those of an earlier version's JSON, and False.

    Raises:
        ValueError: it is no JSON object, or has changed since it was written.
    """
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    first, checksum = value.pop(_FIRST, None), value.pop(_LAST, None)
    if first is None and checksum is None:
        return value, False
    blank = BLANK.encode().join(data.rsplit(str(checksum).encode(), 1))
    if checksum != hashlib.sha256(blank).hexdigest():
        raise ValueError("its checksum is not that of its content")
    return value, True
