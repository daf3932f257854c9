"""What all pages share: the run that is looked at, links within it, and the way around."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode

from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import HTMLResponse

from clipray.errors import JobError
from clipray.report.run_tables import RunTable
from clipray.serve.pages.tiles import Tile
from clipray.serve.responses import HttpError
from clipray.serve.state import ServedRun, run_of, runs_of
from clipray.serve.templating import path_of, render

MOST_PAGES = 1_000_000


@dataclass(frozen=True)
class Section:
    """A place in the navigation. is_here: the page is of it."""

    title: str
    url: Markup
    is_here: bool


@dataclass(frozen=True)
class Site:
    """The run of a page, and links within it.

    Attributes:
        path: of the page's own address.
    """

    run: ServedRun
    runs: tuple[ServedRun, ...]
    path: str

    @classmethod
    def of(cls, request: Request) -> Site:
        return cls(run_of(request), tuple(runs_of(request)), request.url.path)

    @property
    def has_runs(self) -> bool:
        """Whether addresses must name the run."""
        return len(self.runs) > 1

    def link(self, path: str, /, **query: object) -> Markup:
        """An address of this server, escaped. Values that are None or empty are left out, lists are repeated."""
        return self.address(path, query.items())

    def address(self, path: str, pairs: Iterable[tuple[str, object]]) -> Markup:
        """The same of pairs of a name and a value."""
        named = [*pairs, ("run", self.run.name if self.has_runs else None)]
        query = urlencode([(name, value) for name, value in named if value not in (None, "")], doseq=True)
        return escape(f"{path}?{query}" if query else path)

    def row(self, row_id: str) -> Markup:
        return self.link(f"/rows/{path_of(row_id)}")

    def thumbnail(self, image_id: str, size: int = 320, region: str | None = None) -> Markup:
        return self.link(f"/thumbnail/{path_of(image_id)}", size=size, region=region)

    def more_like(self, tile: Tile) -> Markup | None:
        """The search for rows like this one, in the first index of rows of its sort; None where there is none."""
        column = "region_id" if tile.region_id else "text_id" if tile.text is not None else "image_id"
        others = {"region_id", "text_id", "image_id"} - {column, "image_id"}
        indexes = [
            t.name for t in self.run.indexes if column in t.record.columns and not others & t.record.columns.keys()
        ]
        if not indexes:
            return None
        return self.link("/search", like=tile.row_id, index=indexes[0] if len(self.run.indexes) > 1 else None)

    @property
    def sections(self) -> list[Section]:
        """The places that this run has something for."""
        tables = self.run.tables
        places = [("Search", "/search")] if self.run.indexes else []
        for title, table_type in TYPES.items():
            places += [(title, f"/{title.lower()}/{path_of(table.name)}") for table in tables.of_type(table_type)[:1]]
        if any(table.record.rejects for table in tables.tables):
            places.append(("Rejects", "/rejects"))
        places += [("Tables", "/tables"), ("Report", "/report"), ("API", "/api")]
        return [Section(title, self.link(path), self._is_in(path)) for title, path in places]

    def _is_in(self, path: str) -> bool:
        return self.path.split("/")[1] == path.split("/")[1]


TYPES = {"Map": "map", "Clusters": "clusters", "Labels": "labels", "Duplicates": "duplicates"}
"""Places for tables of a type, which is the page's first word too."""


def page(request: Request, template: str, /, status: int = HTTPStatus.OK, **values: Any) -> HTMLResponse:
    """The template as an answer. It has `site` besides the values."""
    return HTMLResponse(render(template, site=Site.of(request), **values), status)


@dataclass(frozen=True)
class Pager:
    """A part of many rows. number: of the page, from 1."""

    number: int
    size: int
    total: int

    @classmethod
    def of(cls, request: Request, size: int, total: int) -> Pager:
        """The page that a request names with `page=`. Raises JobError: no number."""
        return cls(whole_number(request, "page", 1), size, total)

    @property
    def offset(self) -> int:
        return (self.number - 1) * self.size

    @property
    def last(self) -> int:
        """The number of the last page."""
        return max(-(-self.total // self.size), 1)

    @property
    def first_row(self) -> int:
        """From 1."""
        return min(self.offset + 1, self.total)

    @property
    def last_row(self) -> int:
        return min(self.offset + self.size, self.total)


def whole_number(request: Request, name: str, default: int, least: int = 1) -> int:
    """A number of the address. Raises JobError: it is none, or out of range."""
    value = request.query_params.get(name) or str(default)
    if not value.isdecimal() or not value.isascii() or not least <= int(value[:12]) <= MOST_PAGES:
        raise JobError(f"{name}: expected a whole number from {least} to {MOST_PAGES}, found {value[:40]!r}")
    return int(value)


def choice(request: Request, name: str, choices: Collection[str]) -> str:
    """One of the choices, the first where the address names none. Raises JobError: it names another."""
    value = request.query_params.get(name) or next(iter(choices))
    if value not in choices:
        raise JobError(f"{name}: expected one of {', '.join(choices)}, found {value[:40]!r}")
    return value


def table_of_type(run: ServedRun, name: str, table_type: str) -> RunTable:
    """A table. Raises HttpError 404: there is none of this name, or it is of another type."""
    table = run.table(name)
    if table.type != table_type:
        raise HttpError(404, f"{name} is a table of type {table.type}, expected one of {table_type}")
    return table


def version_of(run: ServedRun) -> str:
    """Another one after each table that is finished anew: what was computed from the tables before is then out of date."""
    tables = run.tables.tables
    return f"{len(tables)} {max((table.record.finished_at for table in tables), default='')}"
