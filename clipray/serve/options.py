"""Who may ask the server, and for what."""

from __future__ import annotations

from dataclasses import dataclass

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class ServeOptions:
    """What the server allows.

    Attributes:
        hosts: names that a request's `Host` may have, without a port; empty: any, which is safe with a token only.
        token: a secret that each request must carry, as a bearer token or as the cookie that `/?token=…` sets; "": none.
        allow_urls: images may be named by URL, which the server then fetches from public addresses.
        max_upload_bytes: the largest body of a request.
        index: the index that is searched, where a run has several; "": the first over whole rows.
    """

    hosts: tuple[str, ...] = LOOPBACK_NAMES
    token: str = ""
    allow_urls: bool = False
    max_upload_bytes: int = 64 * 2**20
    index: str = ""
