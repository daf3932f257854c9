"""The run's report, made anew with links into the served page."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import HTMLResponse

from clipray.job import Report
from clipray.report.links import Links
from clipray.report.page import make_page
from clipray.serve.pages.layout import Site, version_of
from clipray.serve.templating import path_of

KEPT = 4  # reports
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
"""The report has its styles and images in itself, and no script."""


@dataclass(frozen=True)
class SiteLinks(Links):
    """Links of the report into the served page of its run."""

    site: Site | None = None

    def row(self, name: str) -> str:
        assert self.site is not None
        return self.site.row(name).unescape()

    def cluster(self, table: str, number: int) -> str:
        assert self.site is not None
        return self.site.link(f"/clusters/{path_of(table)}/{number}").unescape()


def report_page(request: Request) -> HTMLResponse:
    """GET /report"""
    site = Site.of(request)
    return HTMLResponse(_report(site, version_of(site.run)), headers={"Content-Security-Policy": POLICY})


@functools.lru_cache(KEPT)
def _report(site: Site, _version: str) -> str:
    tables = site.run.tables
    return make_page(tables, site.run.name, Report(name="report", of=None), SiteLinks(site=site)).html
