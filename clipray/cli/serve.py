"""The verb that serves runs to a browser."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from clipray.cli.app import app, err

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # of many short queries at once each takes a core, and none waits for others
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # its own pool and that of Polars keep 80 MB that are free
    "_RJEM_MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:0",
}
"""What libraries read when they are imported; what is set already stays."""


@app.command(rich_help_panel="Look")
def serve(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="Output folders of jobs.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any but this machine's own asks for a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0: any that is free.")] = 8000,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    index: Annotated[str, typer.Option(help="Table of the index to search, where a run has several.")] = "",
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Search with images by URL, which the server fetches.")
    ] = False,
    token: Annotated[
        str,
        typer.Option(
            help="Secret that each request must carry. [default: a new one, if needed]", envvar="CLIPRAY_TOKEN"
        ),
    ] = "",
) -> None:
    """Search and browse runs in a browser."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    from clipray.runner.lock import interrupt_on_sigterm
    from clipray.serve import refuse_missing
    from clipray.serve.options import ServeOptions

    refuse_missing()
    from clipray.serve.server import Address
    from clipray.serve.server import serve as serve_runs

    options = ServeOptions(token=token, allow_urls=allow_urls, index=index)
    with interrupt_on_sigterm():  # so that the local socket is removed
        serve_runs(runs, Address(host, port), options, open_browser=open_browser, say=err.print)
