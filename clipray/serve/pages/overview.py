"""The first page: a search box, what ran, and where one can go from there."""

from __future__ import annotations

from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import HTMLResponse

from clipray.report.run_tables import RunTable
from clipray.report.summary import ran_section
from clipray.serve.pages.layout import page
from clipray.serve.state import run_of

FIGURES = 8  # of a table


def overview(request: Request) -> HTMLResponse:
    """GET /"""
    run = run_of(request)
    section = ran_section(run.tables)
    figures = [(table.name, list(_figures(table))[:FIGURES]) for table in run.tables.tables]
    return page(
        request, "overview.html", ran=section.values, headlines=section.headlines, state=run.state()[0],
        figures=[(name, of_table) for name, of_table in figures if of_table],
    )  # fmt: skip


def _figures(table: RunTable) -> Iterator[tuple[str, float]]:
    """What its step measured, by name; of a metric of several groups, by the metric and the group."""
    for name, value in table.record.summary.items():
        groups = value if isinstance(value, dict) else {"": value}
        for group, figure in groups.items():
            if isinstance(figure, int | float) and not isinstance(figure, bool):
                yield f"{name} {group}".strip(), figure
