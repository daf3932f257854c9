"""Which page answers which address."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import BaseRoute, Route

from clipray.serve.state import run_of, runs_of
from clipray.serve.templating import render


def page_routes() -> list[BaseRoute]:
    return [Route("/", overview)]


def overview(request: Request) -> HTMLResponse:
    run = run_of(request)
    return HTMLResponse(render("overview.html", run=run, runs=list(runs_of(request)), tables=run.tables.tables))
