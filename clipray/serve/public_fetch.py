"""Images by URL, from public addresses only: a client must not reach what only this machine can reach.

Names are resolved here, and the connection goes to the very address that was checked; each redirect is checked again.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from clipray.pipelines.spec import Limits
from clipray.serve.responses import HttpError

REDIRECTS = 5
PORTS = (None, 80, 443)


class _PublicResolver(AbstractResolver):
    """Resolves names to public addresses. Raises HttpError 403: it has another one."""

    def __init__(self) -> None:
        self._resolver = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        addresses = await self._resolver.resolve(host, port, family)
        for address in addresses:
            check_address(host, address["host"])
        return addresses

    async def close(self) -> None:
        await self._resolver.close()


def check_address(host: str, address: str) -> None:
    """Raises HttpError 403: the address is private, of this machine, or otherwise not of the public network."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(parsed, "ipv4_mapped", None) or getattr(parsed, "sixtofour", None) or parsed
    if not (parsed.is_global and inner.is_global) or parsed.is_multicast:
        raise HttpError(403, f"{host} is at {address}, which is no public address: upload the image instead")


def check_url(url: str) -> None:
    """Raises HttpError: not http or https, another port, a name and password, or an address that is not public."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise HttpError(400, f"{url[:200]!r} is no URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise HttpError(400, f"expected a URL of http or https, found {url[:200]!r}")
    if port not in PORTS or parts.username is not None:
        raise HttpError(403, f"{url[:200]!r}: expected no other port than 80 and 443, and no password")
    try:
        check_address(parts.hostname, parts.hostname)
    except ValueError:
        return  # a name: it is checked when it is resolved


async def fetch_public(url: str, limits: Limits) -> bytes:
    """The bytes behind a URL, at most `limits.max_bytes`, within `limits.fetch_timeout_s`.

    Raises:
        HttpError: it is refused, is not there, is too large or does not answer.
    """
    try:
        async with asyncio.timeout(limits.fetch_timeout_s):
            connector = aiohttp.TCPConnector(resolver=_PublicResolver(), force_close=True)
            async with aiohttp.ClientSession(connector=connector, headers={"User-Agent": limits.user_agent}) as session:
                return await _fetched(session, url, limits.max_bytes)
    except TimeoutError:
        raise HttpError(504, f"{url[:200]}: no whole answer within {limits.fetch_timeout_s:g} s") from None
    except aiohttp.ClientError as error:
        refused = _cause(error)
        raise refused or HttpError(502, f"{url[:200]}: {str(error)[:200] or type(error).__name__}") from error


async def _fetched(session: aiohttp.ClientSession, url: str, max_bytes: int) -> bytes:
    for _ in range(REDIRECTS):
        check_url(url)
        async with session.get(url, allow_redirects=False) as response:
            if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                url = urljoin(url, response.headers["Location"])
                continue
            if response.status != 200:
                raise HttpError(502, f"{url[:200]}: its server answered {response.status}")
            data = bytearray()
            async for chunk in response.content.iter_chunked(65_536):
                data += chunk
                if len(data) > max_bytes:
                    raise HttpError(413, f"{url[:200]}: more than {max_bytes // 2**20} MiB")
            return bytes(data)
    raise HttpError(502, f"{url[:200]}: more than {REDIRECTS} redirects")


def _cause(error: BaseException | None) -> Any:
    """The refusal that a client's error wraps, if any."""
    while error is not None:
        if isinstance(error, HttpError):
            return error
        error = error.__cause__ or error.__context__
    return None
