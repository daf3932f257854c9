"""What the commands of the server's own user ask over the local socket. No other client gets here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from clipray import __version__
from clipray.errors import ClipRayError
from clipray.job import Model
from clipray.queries.label import label
from clipray.queries.search import search
from clipray.serve.guard import is_local_socket
from clipray.serve.responses import HttpError, Json, status_of
from clipray.serve.state import ServedRuns, runs_of

Answering = Callable[[ServedRuns, dict[str, Any]], Any]


def local_routes() -> list[BaseRoute]:
    answers: dict[str, Answering] = {"/local/search": _search, "/local/label": _label}
    return [Route(path, _endpoint(answering), methods=["POST"]) for path, answering in answers.items()]


def _endpoint(answering: Answering) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        if not is_local_socket(request.scope):
            raise HttpError(404, "no such page")
        asked = json.loads(await request.body())
        if asked.pop("version") != __version__:
            raise HttpError(409, f"this server is of clipray {__version__}")
        try:
            return Json(await run_in_threadpool(answering, runs_of(request), asked))
        except ClipRayError as error:
            return Json({"error": str(error), "type": type(error).__name__}, status_of(error))

    return endpoint


def _search(runs: ServedRuns, asked: dict[str, Any]) -> Any:
    """As `queries.search.search`; `run` is the absolute path or URL of the run's folder."""
    url = asked.pop("run")
    run = next((run for run in runs if run.output.url == url), None)
    if run is None:
        raise HttpError(404, f"no run {url}")
    index, by_region = asked.pop("index", None) or "", asked.pop("by_region", False)
    if not index and len(run.indexes_over(regions=by_region)) > 1:
        raise HttpError(404, "several indexes")  # the command itself asks which one
    return asdict(search(run.searcher(index, by_region=by_region).searcher, **asked))


def _label(runs: ServedRuns, asked: dict[str, Any]) -> Any:
    """As `queries.label.label`, by a run that has the very model."""
    model = Model(**asked.pop("model"))
    for run in runs:
        encoder = run.searcher().searcher.encoder if run.indexes else None
        if encoder is not None and encoder.is_of(model):
            with encoder.borrowed() as towers:
                return [asdict(look) for look in label(model=towers, **asked)]
    raise HttpError(404, "no run of this model")
