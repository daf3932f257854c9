"""What stands before every request: Host, Origin, token, the size of bodies, and headers of every answer.

A page of a stranger must not reach a server on loopback: not by a form or a script of its own (Origin), and not by a name
of its own that resolves to this machine (Host, DNS rebinding). Requests over the local socket are those of its owner.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipray.serve.options import ServeOptions
from clipray.serve.responses import HttpError, error_response

COOKIE = "clipray_token"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """ASGI middleware. It answers what it refuses, with a line that says why."""

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self._app, self._options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            if not is_local_socket(scope):
                self._check_host(headers)
                _check_origin(headers)
                if self._options.token and not self._has_token(headers):
                    await _as_cookie(scope, self._options.token)(scope, receive, _with_headers(send))
                    return
            body = _Body(receive, headers, self._options.max_upload_bytes)
            await self._app(scope, body.receive, _with_headers(send))
        except HttpError as error:
            await error_response(scope["path"], error)(scope, receive, _with_headers(send))

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._options.hosts and _without_port(host) not in self._options.hosts:
            raise HttpError(
                421, f"Host {host!r} is not one of {', '.join(self._options.hosts)}: open the address that was printed"
            )

    def _has_token(self, headers: Headers) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        secrets = [bearer] if scheme.lower() == "bearer" else []
        return any(_same(secret, self._options.token) for secret in [*secrets, *_cookies(headers)])


def is_local_socket(scope: Scope) -> bool:
    """Whether the request came over the socket in the user's own folder: the server then has a path and no port."""
    server = scope.get("server")
    return server is not None and server[1] is None


def _without_port(host: str) -> str:
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() else host).lower()


def _check_origin(headers: Headers) -> None:
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
        raise HttpError(403, f"Origin {origin!r} is another site's: only this server's own pages may ask")
    embedded = headers.get("sec-fetch-mode") != "navigate"  # a link from another site's page may be followed
    if origin is None and embedded and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        raise HttpError(403, "the request comes from another site's page: only this server's own pages may ask")


def _cookies(headers: Headers) -> Iterable[str]:
    try:
        jar = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return []
    return [jar[COOKIE].value] if COOKIE in jar else []


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "surrogateescape"), other.encode())


def _as_cookie(scope: Scope, token: str) -> RedirectResponse:
    """Take the token out of the address into a cookie. Raises HttpError: there is none, or another one."""
    query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    secrets = [value for name, value in query if name == "token"]
    if not secrets or not _same(secrets[0], token):
        raise HttpError(401, "this server asks for a token: open the address with `?token=…` that it printed")
    rest = urlencode([(name, value) for name, value in query if name != "token"])
    path = "/" + scope["raw_path"].decode("latin-1").lstrip("/")  # with two slashes it would name another host
    response = RedirectResponse(path + (f"?{rest}" if rest else ""), 303)
    response.set_cookie(COOKIE, token, httponly=True, samesite="strict")
    return response


class _Body:
    """A request's body that ends with an error where it becomes too large."""

    def __init__(self, receive: Receive, headers: Headers, max_bytes: int) -> None:
        self._receive, self._left, self._max_bytes = receive, max_bytes, max_bytes
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > max_bytes:
            self._refuse()

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self._refuse()
        return message

    def _refuse(self) -> None:
        raise HttpError(413, f"the body is larger than {self._max_bytes // 2**20} MiB, which is the most that is taken")


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending
