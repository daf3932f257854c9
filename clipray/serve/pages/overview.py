"""The first page: a search box, what ran, and where one can go from there."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import HTMLResponse

from clipray.report.summary import ran_section
from clipray.serve.pages.layout import page
from clipray.serve.search_request import state_of
from clipray.serve.state import run_of


def overview(request: Request) -> HTMLResponse:
    """GET /"""
    run = run_of(request)
    section = ran_section(run.tables)
    return page(request, "overview.html", ran=section.values, headlines=section.headlines, state=state_of(run)[0])
