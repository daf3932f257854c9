"""Paths and URIs: the one place that parses them."""

from __future__ import annotations

import os
import re
from typing import NamedTuple
from urllib.parse import unquote

LOCAL = "file"
HTTP = ("http", "https")

_FILE_URI = re.compile(r"file:(?=/)(?://(?:localhost(?=/))?)?", re.IGNORECASE)
_ABSOLUTE_FILE_URI = re.compile(r"file:(?:/(?!/)|///|//localhost/)", re.IGNORECASE)
_SCHEME = re.compile(r"([^/]*?)://")
_BYTE_RANGE = re.compile(r"#bytes=(\d+)-(\d+)$")


class ByteRange(NamedTuple):
    """The first and the last byte of a part of a file, as in HTTP's header `Range`."""

    first: int
    last: int

    @property
    def size(self) -> int:
        return self.last + 1 - self.first


def split_byte_range(uri: str) -> tuple[str, ByteRange | None]:
    """The address of a part of a file, `URI#bytes=FIRST-LAST`, as the file's own and the part; None for a whole file."""
    match = _BYTE_RANGE.search(uri)
    return (uri[: match.start()], ByteRange(int(match[1]), int(match[2]))) if match else (uri, None)


def with_byte_range(uri: str, offset: int, size: int) -> str:
    """The address of `size` bytes of a file, from `offset` on."""
    first = offset if size else max(offset, 1)  # no bytes end before they begin, and no number is below 0
    return f"{uri}#bytes={first}-{first + size - 1}"


def parse(uri: str) -> tuple[str, str]:
    """A path or URI as (scheme in small letters, what it names there).

    `file` stands for local paths and for file URIs as RFC 8089 has them: `file:///a%20b`, `file:/a`,
    `file://localhost/a`. Their path is decoded; where only a file of the undecoded name is there, it is that file.
    For other URIs the second is everything after `://`, and for a chain such as `zip://a::file://b` the whole chain.
    """
    if is_chain(uri):
        return re.split(r"://|::", uri, maxsplit=1)[0].lower(), uri
    if not uri.startswith("/"):
        if _FILE_URI.match(uri):
            return LOCAL, _decoded(_FILE_URI.sub("", uri, count=1))
        if scheme := _SCHEME.match(uri):
            return scheme[1].lower(), uri[scheme.end() :]
    return LOCAL, uri


def is_local(uri: str) -> bool:
    """Whether it is a path or file URI, and so on this machine."""
    return parse(uri)[0] == LOCAL and not is_chain(uri)


def http_host(uri: str) -> str | None:
    """The host of a file on a web server, with its port; None for other files."""
    scheme, path = parse(uri)
    return path.split("/", 1)[0].rpartition("@")[2].lower() if scheme in HTTP else None


def is_relative(uri: str) -> bool:
    """Whether it is a relative path."""
    return not uri.startswith("/") and not _FILE_URI.match(uri) and is_local(uri)


def is_chain(uri: str) -> bool:
    """Whether fsspec opens one storage inside another, and `::` is not just part of a name."""
    if uri.startswith("/") or _ABSOLUTE_FILE_URI.match(uri):
        return False
    outer, chained, inner = uri.partition("::")
    return bool(chained) and ("://" in inner or ("://" in outer and inner.startswith("/")))


def _decoded(path: str) -> str:
    decoded = unquote(path, errors="surrogateescape")  # a name that is not UTF-8 too
    as_written = decoded != path and not os.path.lexists(decoded) and os.path.lexists(path)
    return path if as_written else decoded
