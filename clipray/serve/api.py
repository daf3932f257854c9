"""The JSON API. Addresses of one row end with its id, which may contain slashes."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from clipray.errors import JobError
from clipray.pipelines.decode import decode
from clipray.report.thumbnails import LIMITS
from clipray.serve.export import export
from clipray.serve.images import SIDES_PX
from clipray.serve.openapi import openapi
from clipray.serve.public_fetch import fetch_public
from clipray.serve.responses import HttpError, Json
from clipray.serve.rows import everything_of
from clipray.serve.search_request import SearchRequest, search
from clipray.serve.state import run_of, runs_of
from clipray.serve.uploads import Uploads
from clipray.tables.reasons import Rejected

MOST_QUERIES = 256  # of a batch
CACHED = {"Cache-Control": "private, max-age=3600"}


def api_routes() -> list[BaseRoute]:
    return [
        Route("/api/search", search_one, methods=["GET"]),
        Route("/api/search", search_batch, methods=["POST"]),
        Route("/api/export", export_hits),
        Route("/api/facets", facets),
        Route("/api/images", upload, methods=["POST"]),
        Route("/api/status", status),
        Route("/api/openapi.json", lambda _request: Json(openapi())),
        Route("/api/rows/{id:path}", row),
        Route("/thumbnail/{id:path}", thumbnail),
        Route("/upload/{name}", uploaded),
    ]


async def search_one(request: Request) -> Response:
    """GET /api/search?text=a+red+circle&top=5"""
    query = SearchRequest.of_query(request.query_params)
    return Json(await answered(request, query))


async def search_batch(request: Request) -> Response:
    """POST /api/search with one query as an object, or several as `{"queries": [...]}`."""
    body = await _json(request)
    queries = body.get("queries") if isinstance(body, dict) and "queries" in body else None
    if queries is None:
        return Json(await answered(request, SearchRequest.of_json(body)))
    if not isinstance(queries, list) or len(queries) > MOST_QUERIES:
        raise JobError(f"queries: expected a list of at most {MOST_QUERIES} queries")
    parsed = [SearchRequest.of_json(query) for query in queries]
    return Json({"answers": await asyncio.gather(*(answered(request, query) for query in parsed))})


async def answered(request: Request, query: SearchRequest) -> dict[str, Any]:
    if query.url and not request.app.state.options.allow_urls:
        raise HttpError(
            403, "images by URL are not allowed here: start the server with --allow-urls, or upload the image"
        )
    fetched = [await fetch_public(url, LIMITS) for url in query.url]
    run = runs_of(request).run(query.run)
    return await run_in_threadpool(search, run, query, _uploads(request), fetched)


async def export_hits(request: Request) -> Response:
    """GET /api/export?format=csv|parquet|manifest and the parameters of /api/search."""
    query = SearchRequest.of_query(request.query_params)
    hits = (await answered(request, query))["hits"]
    run = runs_of(request).run(query.run)
    return await run_in_threadpool(export, run, hits, request.query_params.get("format", "csv"))


def facets(request: Request) -> Response:
    """GET /api/facets?where=…: values of the columns with their counts, and ranges of numbers."""
    query = SearchRequest.of_query(request.query_params)
    columns = run_of(request).searcher(query.index).searcher.columns
    mask = columns.mask(query.where) if query.where else None
    counted = {name: asdict(facet) for name, facet in columns.facets(query.column or None, mask).items()}
    return Json(
        {"facets": counted, "matching": len(columns) if mask is None else int(mask.sum()), "rows": len(columns)}
    )


async def upload(request: Request) -> Response:
    """POST /api/images with the bytes of an image. Answers with its name for `image=`."""
    data = await request.body()

    def checked() -> Response:
        try:
            size = decode(data, LIMITS).size
        except Rejected as rejected:
            raise HttpError(HTTPStatus.UNPROCESSABLE_ENTITY, f"{rejected.reason}: {rejected.message}") from rejected
        return Json({"image": _uploads(request).add(data), "width": size[0], "height": size[1]}, HTTPStatus.CREATED)

    return await run_in_threadpool(checked)


def uploaded(request: Request) -> Response:
    """GET /upload/NAME: a thumbnail of an uploaded image."""
    from clipray.report.thumbnails import ImageSource, Thumbnails

    data = _uploads(request).get(request.path_params["name"])
    webp = Thumbnails(320, 60_000).webp(data, ImageSource("", None, (0, 0)))
    return Response(webp, media_type="image/webp", headers=CACHED)


def status(request: Request) -> Response:
    """GET /api/status: of each run its tables, and whether it answers to words."""
    runs = []
    for run in runs_of(request):
        state, opened = run.state()
        index = opened.searcher if opened else None
        runs.append({
            "run": run.name, "output": run.output.url, "state": state, "index": index.name if index else None,
            "rows": index.n_rows if index else None,
            "tables": [{"table": t.name, "type": t.type, "rows": t.record.rows} for t in run.tables.tables],
        })  # fmt: skip
    return Json({"runs": runs, "allow_urls": request.app.state.options.allow_urls})


def row(request: Request) -> Response:
    """GET /api/rows/ID: everything that the run's tables say of a row."""
    return Json(everything_of(run_of(request), request.path_params["id"]))


def thumbnail(request: Request) -> Response:
    """GET /thumbnail/ID?size=320&region=REGION_ID"""
    size = request.query_params.get("size", "320")
    if size not in map(str, SIDES_PX):
        raise JobError(f"size: expected one of {', '.join(map(str, SIDES_PX))}, found {size[:20]!r}")
    region = request.query_params.get("region", "")
    webp = run_of(request).images.thumbnail(request.path_params["id"], int(size), region)
    return Response(webp, media_type="image/webp", headers=CACHED)


def _uploads(request: Request) -> Uploads:
    uploads = request.app.state.uploads
    assert isinstance(uploads, Uploads)
    return uploads


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise JobError(f"expected JSON: {str(error)[:100]}") from error
