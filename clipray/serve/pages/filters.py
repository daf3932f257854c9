"""What the rows of a query hold, column by column, as links and forms that narrow it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import polars as pl
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from clipray.queries.facets import Facet
from clipray.serve.pages.conditions import between, column_name, contains, equals, has, toggled
from clipray.serve.pages.layout import Site, page
from clipray.serve.pages.search_page import Query

MOST_VALUES = 12  # of a column


@dataclass(frozen=True)
class Value:
    """A value of a column. url: the query with it as a condition, or without it if `is_on`."""

    value: Any
    rows: int
    url: Markup
    is_on: bool


@dataclass(frozen=True)
class Column:
    """A column to filter by.

    Attributes:
        values: the most frequent ones. bars: height of each bin of its histogram, in % of the highest.
        is_text: strings, which can be looked into.
    """

    name: str
    facet: Facet
    is_text: bool
    values: list[Value] = field(default_factory=list)
    bars: list[float] = field(default_factory=list)

    @property
    def has_range(self) -> bool:
        return self.facet.low is not None and self.facet.low != self.facet.high


def filters(request: Request) -> Response:
    """GET /search/filters with the query's parameters: its facets. With `column_name=` a condition is added to it."""
    site = Site.of(request)
    query = Query(site, request)
    if request.query_params.get("column_name"):
        return RedirectResponse(_narrowed(request, query).unescape(), 303)
    return _facets(request, site, query)


def _facets(request: Request, site: Site, query: Query) -> HTMLResponse:
    columns = site.run.searcher(query.first("index")).searcher.columns
    where = query.first("where")
    facets = columns.facets(mask=columns.mask(where) if where else None, top=MOST_VALUES)
    texts = [name for name, dtype in columns.schema.items() if dtype == pl.String]
    shown = [
        _column(query, where, name, facet, name in texts)
        for name, facet in facets.items()
        if _tells(name, facet, where)
    ]
    shown += [Column(name, Facet(0, 0), True) for name in texts if name not in facets]
    return page(request, "filters.html", query=query, columns=shown)


def _tells(name: str, facet: Facet, where: str) -> bool:
    """Whether a column can narrow the query, or does."""
    is_constant = facet.n_values == 1 and not facet.nulls
    return bool(facet.rows) and (not is_constant or column_name(name) in where)


def _column(query: Query, where: str, name: str, facet: Facet, is_text: bool) -> Column:
    values = [_value(query, where, name, *counted) for counted in facet.values[:MOST_VALUES]]
    most = max(facet.bins, default=0)
    return Column(name, facet, is_text, values, [round(100 * n / most, 1) for n in facet.bins])


def _value(query: Query, where: str, name: str, value: Any, rows: int) -> Value:
    condition = equals(name, value)
    return Value(value, rows, query.replaced("where", toggled(where, condition)), has(where, condition))


def _narrowed(request: Request, query: Query) -> Markup:
    """The query with the range, or the text, that a form names."""
    name, where = request.query_params["column_name"], query.first("where")
    asked = {key: request.query_params.get(key, "").strip() for key in ("low", "high", "contains")}
    conditions = between(name, asked["low"], asked["high"])
    if asked["contains"]:
        conditions.append(contains(name, asked["contains"]))
    for condition in conditions:
        where = where if has(where, condition) else toggled(where, condition)
    return query.replaced("where", where)
