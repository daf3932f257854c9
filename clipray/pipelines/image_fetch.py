"""Fetches a file, or a part of one, by its URI, bounded in size and time. Servers that fail for a moment are asked again."""

from __future__ import annotations

import asyncio
import email.utils
import errno
import os
import stat
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from http import HTTPStatus
from urllib.parse import urljoin

import aiohttp
import fsspec
from fsspec.asyn import sync

from clipray.errors import ClipRayError
from clipray.pipelines.retries import Failure, Retries
from clipray.pipelines.robots_tag import disallowing_directive
from clipray.pipelines.spec import Limits
from clipray.storage.folder import filesystem
from clipray.storage.uris import HTTP, LOCAL, ByteRange, is_chain, parse, split_byte_range
from clipray.tables.reasons import HttpReason, Reason, Rejected, http_reason

REDIRECTS = 10
WINDOWS = 6  # of the time for a request, in each of which a body must come faster than
DRIP_BYTES_PER_S = 1_000
LASTING_ERRNOS: dict[int, Reason] = {
    errno.ENOENT: "not_found", errno.ENOTDIR: "not_found", errno.ENAMETOOLONG: "not_found", errno.ELOOP: "not_found",
    errno.EACCES: "forbidden", errno.EPERM: "forbidden", errno.EISDIR: "not_a_file", errno.EINVAL: "invalid_uri",
}  # fmt: skip
STORED: tuple[tuple[type[Exception], Reason], ...] = (
    (FileNotFoundError, "not_found"), (PermissionError, "forbidden"), (IsADirectoryError, "not_a_file"),
)  # fmt: skip


class StatusError(Exception):
    """A server's answer that holds no file."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class NoRoom(Exception):
    """The file is larger than the room that its reader has for it.

    Attributes:
        size: in bytes, at most `max_bytes`, which also stands for an unknown size.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


class Fetcher:
    """Fetches files. Safe to use in several threads.

    Use one for all files of a pass: it remembers which servers do not answer, so each costs `fetch_timeout_s` only once.
    """

    def __init__(self, limits: Limits, retries: Retries | None = None) -> None:
        self._limits, self._retries = limits, retries or Retries()

    def fetch(self, uri: str, room: int | None = None) -> bytes:
        """The file's bytes, at most `max_bytes` of them read, and of a file on a server no more than `room`.

        Of `URI#bytes=FIRST-LAST` only these bytes are read, and these count.

        Raises:
            NoRoom: it has more than `room` bytes.
            Rejected: stage `fetch`, with a status (`http_404`) where a server answered with one.
        """
        limits = self._limits
        file, part = split_byte_range(uri)
        scheme, path = parse(file)
        if scheme not in limits.schemes or is_chain(uri):
            message = f"{uri}: scheme {scheme!r} is not among {', '.join(limits.schemes)}"
            raise Rejected("fetch", "scheme_not_allowed", message)
        if part:
            _refuse_size(uri, part, limits)
        if scheme == LOCAL:
            return checked_bytes(_whole(_read_local(path, limits, part), uri, part), limits)
        if part and room and part.size > room:
            raise NoRoom(part.size)
        server = f"{scheme}://{path.split('/', 1)[0].rpartition('@')[2]}"
        data = self._retries.run(
            lambda seconds: self._request(uri, server, seconds, min(room or limits.max_bytes, limits.max_bytes)),
            server, uri, limits.fetch_timeout_s, limits.patience,
        )  # fmt: skip
        return checked_bytes(_whole(data, uri, part), limits)

    def read(self, uri: str | None, data: bytes | None) -> bytes:
        """The bytes of a row: `data` if it has some, else those of the file. Raises Rejected, also for a row with neither."""
        if data is not None:
            return checked_bytes(data, self._limits)
        if not uri:
            raise Rejected("manifest", "no_source", "neither `uri` nor `bytes`")
        return self.fetch(uri)

    def _request(self, uri: str, server: str, seconds: float, room: int) -> bytes:
        try:
            file, part = split_byte_range(uri)
            scheme, path = parse(file)
            if scheme in HTTP:
                return self._get(f"{scheme}://{path}", server, seconds, room, part)
            return _read_object(file, self._limits, seconds, room, part)
        except NoRoom:
            raise
        except Rejected as rejected:
            raise Failure(rejected, answered=True) from rejected
        except Exception as error:  # every filesystem has its own errors
            raise _failure(uri, error, self._limits) from error

    def _get(self, url: str, server: str, seconds: float, room: int, part: ByteRange | None) -> bytes:
        fs = fsspec.filesystem("http", client_kwargs={"trust_env": True})  # proxies from the environment, as usual

        async def get() -> bytes:
            return await self._follow(await fs.set_session(), url, server, room, part)

        return sync(fs.loop, asyncio.wait_for, get(), seconds)

    async def _follow(
        self, session: aiohttp.ClientSession, url: str, server: str, room: int, part: ByteRange | None
    ) -> bytes:
        headers = {"User-Agent": self._limits.user_agent}
        if part:
            headers |= {"Range": f"bytes={part.first}-{part.last}", "Accept-Encoding": "identity"}
        no_timeout = aiohttp.ClientTimeout()  # of its own
        for _ in range(REDIRECTS + 1):
            async with session.get(url, headers=headers, allow_redirects=False, timeout=no_timeout) as response:
                self._retries.servers.answered(server)
                if response.status < HTTPStatus.MULTIPLE_CHOICES:
                    self._check_robots_tag(url, response)
                    return await _bounded(response, url, self._limits, room, part)
                url = self._redirected(url, response)
        raise StatusError(response.status, f"more than {REDIRECTS} redirects", {})

    def _check_robots_tag(self, url: str, response: aiohttp.ClientResponse) -> None:
        limits, values = self._limits, response.headers.getall("X-Robots-Tag", [])
        if directive := disallowing_directive(values, limits.user_agent, limits.disallowed_header_directives):
            raise Rejected("fetch", "robots_disallowed", f"{url}: X-Robots-Tag: {directive}")

    def _redirected(self, url: str, response: aiohttp.ClientResponse) -> str:
        location = response.headers.get("Location")
        if response.status >= HTTPStatus.BAD_REQUEST or not location:
            raise StatusError(response.status, response.reason or "", response.headers)
        to = urljoin(url, location)
        scheme = parse(to)[0]
        if scheme not in HTTP or scheme not in self._limits.schemes:
            raise Rejected("fetch", "scheme_not_allowed", f"{url}: redirects to {to}, whose scheme is not allowed")
        return to


def fetch(uri: str, limits: Limits) -> bytes:
    """A single file's bytes. Raises Rejected as `Fetcher.fetch` does."""
    return Fetcher(limits).fetch(uri)


def checked_bytes(data: bytes, limits: Limits) -> bytes:
    """`data` itself. Raises Rejected when it is empty or too large."""
    if len(data) > limits.max_bytes:
        raise Rejected("fetch", "too_many_bytes", f"more than max_bytes={limits.max_bytes}")
    if not data:
        raise Rejected("fetch", "empty", "the file has 0 bytes")
    return data


def _refuse_size(uri: str, part: ByteRange, limits: Limits) -> None:
    """Raises Rejected where a part of a file is too large, or holds nothing."""
    if part.size > limits.max_bytes:
        raise Rejected("fetch", "too_many_bytes", f"{uri}: {part.size} bytes, more than max_bytes={limits.max_bytes}")
    if part.size < 0:
        raise Rejected("fetch", "invalid_uri", f"{uri}: the last byte is before the first")
    if part.size == 0:
        raise Rejected("fetch", "empty", f"{uri}: 0 bytes")


def _whole(data: bytes, uri: str, part: ByteRange | None) -> bytes:
    """`data` itself. Raises Rejected where the file ends before its part does."""
    if part and len(data) < part.size:
        message = f"{uri}: the file ends {part.size - len(data)} bytes too early; it is not the one that was indexed"
        raise Rejected("fetch", "truncated", message)
    return data


def _read_local(path: str, limits: Limits, part: ByteRange | None) -> bytes:
    try:
        mode = os.stat(path)
        if not stat.S_ISREG(mode.st_mode):  # opening a pipe or a device would wait for ever
            raise Rejected("fetch", "not_a_file", f"{path}: not a regular file")
        if not part and mode.st_size > limits.max_bytes:
            message = f"{path}: {mode.st_size} bytes, more than max_bytes={limits.max_bytes}"
            raise Rejected("fetch", "too_many_bytes", message)
        with open(path, "rb") as file:
            return os.pread(file.fileno(), part.size, part.first) if part else file.read(limits.max_bytes + 1)
    except OSError as error:  # what is not known to last may be a network disk's
        reason = LASTING_ERRNOS.get(error.errno or 0, "unreachable")
        raise Rejected("fetch", reason, f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise Rejected("fetch", "invalid_uri", f"{path!r}: {error}") from error


def _read_object(uri: str, limits: Limits, seconds: float, room: int, part: ByteRange | None) -> bytes:
    """A file of object storage, or a part of it: one request, for no more than may be read."""
    fs, path = filesystem(uri, attempts=1)
    within = {"timeout": seconds} if getattr(fs, "async_impl", False) else {}
    if part:
        return fs.cat_file(path, start=part.first, end=part.last + 1, **within)
    data = fs.cat_file(path, start=0, end=room + 1, **within)
    if len(data) > room and room < limits.max_bytes:
        raise NoRoom(min(fs.info(path, **within)["size"], limits.max_bytes))
    return data


async def _bounded(
    response: aiohttp.ClientResponse, url: str, limits: Limits, room: int, part: ByteRange | None
) -> bytes:
    """The body, or of a whole file that a server sends all the same the part that was asked for, and nothing behind it.

    Raises TimeoutError as soon as it only drips: the rest of the time is for another request.
    """
    max_bytes = limits.max_bytes
    if part is None and (response.content_length or 0) > max_bytes:
        message = f"{url}: {response.content_length} bytes, more than max_bytes={max_bytes}"
        raise Rejected("fetch", "too_many_bytes", message)
    if part is None and (response.content_length or 0) > room:
        raise NoRoom(response.content_length or 0)
    skipped = part.first if part and response.status != HTTPStatus.PARTIAL_CONTENT else 0
    data = bytearray()
    async for chunk in _flowing(response, limits.fetch_timeout_s / WINDOWS):
        data += chunk[skipped:]
        skipped -= min(skipped, len(chunk))
        if part and len(data) >= part.size:
            return bytes(data[: part.size])
        if len(data) > max_bytes:
            raise Rejected("fetch", "too_many_bytes", f"{url}: more than max_bytes={max_bytes}")
        if len(data) > room:
            raise NoRoom(max_bytes)
    return bytes(data)


async def _flowing(response: aiohttp.ClientResponse, window_s: float) -> AsyncIterator[bytes]:
    """The body in pieces. Raises TimeoutError as soon as it only drips."""
    clock = asyncio.get_running_loop().time
    since, count = clock(), 0
    while chunk := await asyncio.wait_for(response.content.readany(), window_s):
        count += len(chunk)
        if clock() - since >= window_s:
            if count < DRIP_BYTES_PER_S * window_s:
                raise TimeoutError
            since, count = clock(), 0
        yield chunk


def _failure(uri: str, error: Exception, limits: Limits) -> Failure:
    """What another library raised, in our words."""

    def failure(
        reason: Reason | HttpReason, why: str, *, answered: bool = True, again: bool = True, wait_s: float = 0
    ) -> Failure:
        return Failure(Rejected("fetch", reason, f"{uri}: {why}"), answered=answered, again=again, retry_after_s=wait_s)

    causes = list(_causes(error))
    if any(isinstance(cause, aiohttp.ClientPayloadError) for cause in causes):
        return failure("unreachable", "the connection broke off before the whole file was there")
    status, headers = _answer(causes)
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # no first byte
        if split_byte_range(uri)[1]:
            return failure("truncated", "the file ends before these bytes; it is not the one that was indexed")
        if parse(uri)[0] not in HTTP:
            return failure("empty", "the file has 0 bytes")
    for known, reason in STORED:
        if isinstance(error, known):
            return failure(reason, _text_of(error))
    if any(isinstance(cause, TimeoutError) for cause in causes):
        return failure("timed_out", f"no whole answer within {limits.fetch_timeout_s:g} s", answered=False)
    if status:
        why = f"{status} {_phrase(status, error)}".rstrip()
        return failure(http_reason(status), why, wait_s=_retry_after_s(headers.get("Retry-After")))
    without = any(isinstance(cause, ImportError) for cause in causes)
    if isinstance(error, ValueError | ClipRayError) and not isinstance(error, OSError) and not without:
        return failure("invalid_uri", f"cannot be fetched: {_text_of(error)}")
    hopeless = without or "Credentials" in type(error).__name__
    return failure("unreachable", f"{type(error).__name__}: {_text_of(error)}", answered=False, again=not hopeless)


def _text_of(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:300]


def _phrase(status: int, error: Exception) -> str:
    """A status's standard name, or the server's own words where they say more."""
    if isinstance(error, StatusError) and status < HTTPStatus.BAD_REQUEST:
        return _text_of(error)
    return HTTPStatus(status).phrase if status in set(HTTPStatus) else _text_of(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _answer(causes: list[BaseException]) -> tuple[int, Mapping[str, str]]:
    """Status and headers of the answer that an error is about; 0 where there was none."""
    for cause in causes:
        if type(cause).__module__.startswith("aiohttp"):  # which calls an answer that it cannot read 400
            continue
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            facts = response.get("ResponseMetadata", {})
            headers = {name.title(): value for name, value in facts.get("HTTPHeaders", {}).items()}
            return int(facts.get("HTTPStatusCode", 0)), headers
        for holder in (cause, response):
            for name in ("status", "status_code", "code"):  # ours and aiohttp's; azure's and requests'; gcsfs's
                status = getattr(holder, name, None)
                if isinstance(status, int) and 100 <= status <= 599:
                    return status, getattr(holder, "headers", None) or {}
    return 0, {}


def _retry_after_s(value: str | None) -> float:
    """Seconds of a header `Retry-After`, which holds a number or a date; 0 where it holds neither."""
    if not value:
        return 0.0
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
