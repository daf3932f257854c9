"""Neighbouring parts of one file become one request: a tar of ten thousand images costs tens of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from clipray.storage.uris import ByteRange, is_local, split_byte_range, with_byte_range

GAP_BYTES = 64 * 2**10  # between two parts, which are read sooner than another request is answered
PIECE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Piece:
    """Neighbouring parts of a file, and what lies between them.

    Attributes:
        uri: the address of the whole piece.
        parts: row number -> where its bytes are in the piece.
    """

    uri: str
    size: int
    parts: dict[int, slice]


def merge_ranges(uris: Sequence[str | None], max_bytes: int) -> list[Piece]:
    """Pieces of two or more parts of one file each; parts that have no neighbour are left out.

    Args:
        uris: of rows. Whole files, local ones, and parts of more than `max_bytes` are left out.
    """
    rows_of_file = defaultdict(list)
    for row, uri in enumerate(uris):
        if uri is not None and not is_local(uri):
            file, part = split_byte_range(uri)
            if part and 0 < part.size <= max_bytes:
                rows_of_file[file].append((part, row))
    return [
        _piece(file, together)
        for file, rows in rows_of_file.items()
        for together in _neighbours(sorted(rows))
        if len(together) > 1
    ]


def _neighbours(rows: Iterable[tuple[ByteRange, int]]) -> Iterator[list[tuple[ByteRange, int]]]:
    """Parts in the order of their first bytes, in groups of up to `PIECE_BYTES`."""
    group: list[tuple[ByteRange, int]] = []
    end = 0
    for part, row in rows:
        if group and (part.first - end > GAP_BYTES or max(part.last + 1, end) - group[0][0].first > PIECE_BYTES):
            yield group
            group, end = [], 0
        group.append((part, row))
        end = max(end, part.last + 1)
    if group:
        yield group


def _piece(file: str, rows: Sequence[tuple[ByteRange, int]]) -> Piece:
    first = rows[0][0].first
    size = max(part.last for part, _ in rows) + 1 - first
    parts = {row: slice(part.first - first, part.last + 1 - first) for part, row in rows}
    return Piece(with_byte_range(file, first, size), size, parts)
