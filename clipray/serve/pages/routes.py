"""Which page answers which address."""

from __future__ import annotations

from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from clipray.serve.pages.api_page import api_page
from clipray.serve.pages.clusters_page import cluster_page, clusters_page
from clipray.serve.pages.duplicates_page import duplicate_group_page, duplicates_page
from clipray.serve.pages.filters import filters
from clipray.serve.pages.labels_page import label_rows_page, labels_page
from clipray.serve.pages.map_page import map_codes, map_legend, map_page, map_points, map_rows
from clipray.serve.pages.overview import overview
from clipray.serve.pages.rejects_page import first_bytes_page, rejects_page
from clipray.serve.pages.report_page import report_page
from clipray.serve.pages.row_page import row_page
from clipray.serve.pages.search_page import search_page
from clipray.serve.pages.tables_page import table_page, tables_page
from clipray.serve.responses import HttpError


def page_routes() -> list[BaseRoute]:
    return [
        Route("/", overview),
        Route("/search", search_page),
        Route("/search/filters", filters),
        Route("/rows/{id:path}", row_page),
        Route("/clusters/{table}", clusters_page),
        Route("/clusters/{table}/{cluster_id:int}", cluster_page),
        Route("/labels/{table}", labels_page),
        Route("/labels/{table}/rows", label_rows_page),
        Route("/duplicates/{table}", duplicates_page),
        Route("/duplicates/{table}/{group_id:int}", duplicate_group_page),
        Route("/map/{table}", map_page),
        Route("/map/{table}/rows", map_rows),
        Route("/api/map/points", map_points),
        Route("/api/map/codes", map_codes),
        Route("/api/map/legend", map_legend),
        Route("/rejects", rejects_page),
        Route("/rejects/{table}/{id:path}", first_bytes_page),
        Route("/tables", tables_page),
        Route("/tables/{name}", table_page),
        Route("/report", report_page),
        Route("/api", api_page),
        Route("/{path:path}", nothing_there),
    ]


def nothing_there(request: Request) -> Response:
    """Any other address."""
    raise HttpError(HTTPStatus.NOT_FOUND, f"there is no page {request.url.path[:200]!r}")
