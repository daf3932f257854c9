"""The page of a search. Its address is the query, so that it can be kept, sent and changed by links."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from markupsafe import Markup
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse

from clipray.errors import ClipRayError
from clipray.serve.api import answered
from clipray.serve.pages.layout import Site, page
from clipray.serve.pages.tiles import Tile, tiles_of_hits
from clipray.serve.responses import status_of
from clipray.serve.search_request import MOST_OFFSET, SearchRequest

SIGNS = {"text": 1, "like": 1, "image": 1, "url": 1, "minus": -1, "unlike": -1}
"""Parts of a query, and whether they count for an answer or against it."""


@dataclass(frozen=True)
class Chip:
    """A part of the query. sign: 1 or -1. image: the address of its thumbnail, if it has one. without: the query less it."""

    name: str
    value: str
    sign: int
    image: Markup | None
    without: Markup


class Query:
    """The query of a page, and addresses of others that differ from it by one thing."""

    def __init__(self, site: Site, request: Request) -> None:
        self._site = site
        pairs = request.query_params.multi_items()
        fields = SearchRequest.__dataclass_fields__.keys() - {"run", "offset"}
        self.pairs = [(name, value.strip()) for name, value in pairs if name in fields and value.strip()]

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.pairs if key == name]

    def first(self, name: str) -> str:
        return next(iter(self.values(name)), "")

    @property
    def chips(self) -> Iterator[Chip]:
        for name, value in self.pairs:
            if name in SIGNS:
                without = self._url(pair for pair in self.pairs if pair != (name, value))
                yield Chip(name, value, SIGNS[name], self._image(name, value), without)

    @property
    def rest(self) -> list[tuple[str, str]]:
        """What the form keeps beside its own fields: all but the first of the words, and the condition."""
        shown = {("text", self.first("text")), ("minus", self.first("minus"))}
        return [pair for pair in self.pairs if pair not in shown and pair[0] not in ("where", "index")]

    def like(self, row_id: str) -> Markup:
        """The rows like another one, by the same condition."""
        return self._url([("like", row_id), *self._kept])

    def plus(self, name: str, value: str) -> Markup:
        """The query with another part."""
        return self._url([*(pair for pair in self.pairs if pair != (name, value)), (name, value)])

    def replaced(self, name: str, value: str) -> Markup:
        """The query with another condition or index."""
        return self._url([*(pair for pair in self.pairs if pair[0] != name), (name, value)])

    def export(self, file_format: str) -> Markup:
        pairs = [*self.pairs, ("format", file_format)]
        return self._site.address("/api/export", pairs if self.first("top") else [*pairs, ("top", 1000)])

    def page_from(self, offset: int) -> Markup:
        return self._url([*self.pairs, ("offset", offset)])

    @property
    def facets(self) -> Markup:
        return self._site.address("/search/filters", self.pairs)

    @property
    def here(self) -> Markup:
        return self._url(self.pairs)

    @property
    def _kept(self) -> list[tuple[str, str]]:
        return [pair for pair in self.pairs if pair[0] in ("where", "index", "column", "top")]

    def _url(self, pairs: Iterable[tuple[str, object]]) -> Markup:
        return self._site.address("/search", pairs)

    def _image(self, name: str, value: str) -> Markup | None:
        if name in ("like", "unlike"):
            image_id, _, region = value.rpartition("#")
            is_region = bool(image_id) and region[:1] in ("g", "b") and region[1:].isdecimal()
            return self._site.thumbnail(image_id, 160, value) if is_region else self._site.thumbnail(value, 160)
        return self._site.link(f"/upload/{value}") if name == "image" else None


@dataclass(frozen=True)
class Results:
    """What a query found. error: why it cannot be answered, else "". more: where the tiles go on."""

    tiles: list[Tile]
    answer: dict[str, Any]
    error: str = ""
    more: Markup | None = None
    status: int = HTTPStatus.OK


async def search_page(request: Request) -> HTMLResponse:
    """GET /search with the parameters of /api/search."""
    site = Site.of(request)
    query = Query(site, request)
    state, opened = await run_in_threadpool(site.run.state, query.first("index"))
    waits = state == "loading" and any(query.first(name) for name in ("text", "minus", "image", "url"))
    results = Results([], {}) if waits else await _results(request, site, query)
    return page(
        request, "search.html", results.status, query=query, results=results, state=state, waits=waits,
        index=opened.searcher.name if opened else "", indexes=[table.name for table in site.run.indexes], allow_urls=request.app.state.options.allow_urls,
    )  # fmt: skip


async def _results(request: Request, site: Site, query: Query) -> Results:
    try:
        asked = SearchRequest.of_query(request.query_params)
        answer = await answered(request, asked)
        index = site.run.table(answer["index"])
        tiles = await run_in_threadpool(tiles_of_hits, site.run.tables, index, answer["hits"])
    except ClipRayError as error:
        return Results([], {}, str(error), status=status_of(error))
    after = asked.offset + len(tiles)
    is_last = len(tiles) < asked.top or after > MOST_OFFSET or after >= answer["matching"]
    return Results(tiles, answer, more=None if is_last else query.page_from(after))
