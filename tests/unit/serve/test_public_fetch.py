"""Images by URL: nothing that only this machine can reach, whatever it is called and wherever it redirects."""

from __future__ import annotations

import asyncio
import http.server
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from clipray.report.thumbnails import LIMITS
from clipray.serve import public_fetch
from clipray.serve.responses import HttpError

REFUSED = [
    "http://127.0.0.1/x", "http://localhost/x", "http://[::1]/x", "http://10.1.2.3/x", "http://192.168.0.1/x",
    "http://169.254.169.254/latest/meta-data", "http://[::ffff:127.0.0.1]/x", "http://[fe80::1]/x", "http://0.0.0.0/x",
    "http://[2002:7f00:1::]/x", "http://224.0.0.1/x", "http://100.64.0.1/x", "http://8.8.8.8:22/x", "http://user:pw@8.8.8.8/",
]  # fmt: skip
NO_URLS = [
    "file:///etc/passwd",
    "/etc/passwd",
    "ftp://8.8.8.8/x",
    "s3://bucket/x",
    "http://",
    "http://[::1",
    "http://a:b/",
]


def fetch(url: str) -> bytes:
    return asyncio.run(public_fetch.fetch_public(url, replace(LIMITS, fetch_timeout_s=5.0)))


@pytest.mark.parametrize("url", REFUSED)
def test_only_public_addresses(url: str) -> None:
    with pytest.raises(HttpError) as caught:
        fetch(url)
    assert caught.value.status == 403


@pytest.mark.parametrize("url", NO_URLS)
def test_only_the_web(url: str) -> None:
    with pytest.raises(HttpError) as caught:
        fetch(url)
    assert caught.value.status == 400


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server on loopback, which counts as public by the name `localhost` alone, on its own port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/image":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"bytes of an image")
                return
            self.send_response(302)
            self.send_header(
                "Location", {"/there": "/image", "/loop": "/loop"}.get(self.path, "http://127.0.0.1:1/secret")
            )
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    check = public_fetch.check_address
    monkeypatch.setattr(
        public_fetch, "check_address", lambda host, ip: None if host == "localhost" else check(host, ip)
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        monkeypatch.setattr(public_fetch, "PORTS", (None, 1, listener.server_port))
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield f"http://localhost:{listener.server_port}"
        listener.shutdown()


def test_redirects_are_checked_each(server: str) -> None:
    assert fetch(f"{server}/there") == b"bytes of an image"
    with pytest.raises(HttpError, match=r"127\.0\.0\.1 is at 127\.0\.0\.1, which is no public address"):
        fetch(f"{server}/elsewhere")
    with pytest.raises(HttpError, match="more than 5 redirects"):
        fetch(f"{server}/loop")
