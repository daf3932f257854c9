"""What is refused before it reaches a page: foreign hosts and origins, missing tokens, bodies that are too large."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from clipray.errors import ClipRayError
from clipray.serve.guard import Guard
from clipray.serve.options import ServeOptions
from clipray.serve.responses import on_error


async def echo(request: Request) -> Response:
    return PlainTextResponse(f"{len(await request.body())} bytes")


def client(host: str = "localhost:8000", **options: Any) -> TestClient:
    guarded = Starlette(
        routes=[Route("/{path:path}", echo, methods=["GET", "POST"])],
        middleware=[Middleware(Guard, options=ServeOptions(**options))],
        exception_handlers={ClipRayError: on_error},
    )
    return TestClient(guarded, base_url=f"http://{host}", follow_redirects=False)


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"])
def test_this_machine_may_ask(host: str) -> None:
    answer = client(host).get("/x")
    assert (answer.status_code, answer.text) == (200, "0 bytes")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("host", ["evil.example:8000", "localhost.evil.example", "10.0.0.1:8000"])
def test_a_name_of_a_stranger_that_leads_here_is_refused(host: str) -> None:
    """DNS rebinding: the stranger's page would be of the same origin as this server."""
    answer = client(host).get("/api/search")
    assert answer.status_code == 421
    assert answer.json()["error"].startswith(f"Host {host!r} is not one of localhost")
    assert "content-security-policy" in answer.headers


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:9000", "https://localhost.evil:8000"]
)
def test_pages_of_other_sites_may_not_ask(method: str, origin: str) -> None:
    answer = client().request(method, "/api/images", headers={"Origin": origin})
    assert answer.status_code == 403
    assert "another site" in answer.json()["error"]


def test_own_pages_may_ask_and_links_from_elsewhere_may_be_followed() -> None:
    asked = client()
    assert asked.post("/api/images", headers={"Origin": "http://localhost:8000"}).status_code == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert asked.get("/search", headers=link).status_code == 200
    embedded = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert asked.get("/thumbnail/x", headers=embedded).status_code == 403


def test_a_token_is_asked_for_and_becomes_a_cookie() -> None:
    asked = client("box:8000", hosts=(), token="secret")
    refused = asked.get("/")
    assert refused.status_code == 401
    assert "asks for a token" in refused.text
    assert asked.get("/?token=other").status_code == 401
    assert asked.get("/x", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert asked.get("/x", headers={"Authorization": "Bearer sécret".encode()}).status_code == 401
    first = asked.get("/search?text=a&token=secret&text=b")
    assert (first.status_code, first.headers["location"]) == (303, "/search?text=a&text=b")
    cookie = first.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert asked.get("/search").status_code == 200  # with the cookie


def test_a_redirect_stays_on_this_server() -> None:
    """`//evil.example` as a path would be another host as an address."""
    answer = client("box", hosts=(), token="secret").get("http://box//evil.example/?token=secret")
    assert answer.headers["location"].startswith("/evil.example")


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_are_bounded(chunked: bool) -> None:
    asked = client(max_upload_bytes=2 * 2**20)
    pieces = [b"x" * 2**20] * 2
    assert asked.post("/api/images", content=iter(pieces) if chunked else b"".join(pieces)).text == "2097152 bytes"
    pieces.append(b"x")
    answer = asked.post("/api/images", content=iter(pieces) if chunked else b"".join(pieces))
    assert answer.status_code == 413
    assert answer.json()["error"] == "the body is larger than 2 MiB, which is the most that is taken"


def test_errors_are_pages_to_people() -> None:
    answer = client("evil.example").get("/<script>alert(1)</script>")
    assert answer.headers["content-type"].startswith("text/html")
    assert "<script>" not in answer.text
    assert "Host" in answer.text
