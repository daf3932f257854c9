"""A served page over finished runs, and a JSON API that mirrors it. Needs `clipray[serve]`."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from clipray.errors import JobError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from clipray.serve.options import ServeOptions


def app(*runs: str, options: ServeOptions | None = None) -> Starlette:
    """The server of some runs as an ASGI application, to be mounted in, or run by, a server of one's own.

    Args:
        runs: output folders of jobs, paths or URLs; requests that name none are about the first.
        options: who may ask, and for what; by default only pages that this machine itself opens.

    Raises:
        JobError: Starlette is not installed; no run, or a folder that is none.
    """
    refuse_missing()
    from clipray.serve.application import make_app
    from clipray.serve.options import ServeOptions

    return make_app(runs, options or ServeOptions())


def refuse_missing() -> None:
    """Raises JobError where Starlette or uvicorn is not installed."""
    if not all(map(importlib.util.find_spec, ("starlette", "uvicorn"))):
        raise JobError('the served page needs Starlette and uvicorn: pip install "clipray[serve]"')
