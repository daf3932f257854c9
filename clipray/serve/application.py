"""The application: which function answers which address."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Mount
from starlette.staticfiles import StaticFiles

from clipray.errors import ClipRayError
from clipray.serve.api import api_routes
from clipray.serve.guard import Guard
from clipray.serve.local_api import local_routes
from clipray.serve.options import ServeOptions
from clipray.serve.pages.routes import page_routes
from clipray.serve.responses import on_error
from clipray.serve.state import ServedRuns
from clipray.serve.uploads import Uploads


def make_app(urls: Sequence[str], options: ServeOptions) -> Starlette:
    """See `clipray.serve.app`."""
    runs = ServedRuns(urls, options.index)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        with runs.warming_up():
            yield

    static: list[BaseRoute] = [Mount("/static", StaticFiles(packages=[("clipray.serve", "static")]))]
    app = Starlette(
        routes=[*api_routes(), *local_routes(), *static, *page_routes()],
        middleware=[Middleware(Guard, options=options)],
        exception_handlers={ClipRayError: on_error},
        lifespan=lifespan,
    )
    app.state.runs, app.state.options, app.state.uploads = runs, options, Uploads()
    return app
