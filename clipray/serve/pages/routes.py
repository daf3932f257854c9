"""Which page answers which address."""

from __future__ import annotations

from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from clipray.serve.pages.filters import filters
from clipray.serve.pages.overview import overview
from clipray.serve.pages.search_page import search_page
from clipray.serve.responses import HttpError


def page_routes() -> list[BaseRoute]:
    return [
        Route("/", overview),
        Route("/search", search_page),
        Route("/search/filters", filters),
        Route("/{path:path}", nothing_there),
    ]


def nothing_there(request: Request) -> Response:
    """Any other address."""
    raise HttpError(HTTPStatus.NOT_FOUND, f"there is no page {request.url.path[:200]!r}")
