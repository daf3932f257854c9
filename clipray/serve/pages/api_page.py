"""The page that describes the JSON API, made of its OpenAPI description."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import HTMLResponse

from clipray.serve.openapi import openapi
from clipray.serve.pages.layout import page


def api_page(request: Request) -> HTMLResponse:
    """GET /api"""
    description = openapi()
    operations = [
        (method.upper(), path, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    host = request.headers.get("host", "localhost")
    return page(
        request, "api.html", operations=operations, schemas=description["components"]["schemas"],
        server=f"{request.url.scheme}://{host}",
    )  # fmt: skip
