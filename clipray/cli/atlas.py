"""The verb that hands a run's map to embedding-atlas."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from clipray.cli.app import app, err, out


@app.command(rich_help_panel="Look")
def atlas(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Output folder of a job with a `project` step.")],
    to: Annotated[str | None, typer.Option(help="Write this file. [default: atlas.parquet in RUN]")] = None,
    table: Annotated[str, typer.Option("--map", help="Table of the map, where there are several.")] = "",
    thumbnail_px: Annotated[int, typer.Option(min=0, help="Longest side of the thumbnails; 0: none.")] = 160,
    start: Annotated[bool, typer.Option("--start/--no-start", help="Start embedding-atlas on the file.")] = True,
) -> None:
    """Hand the map of a run to embedding-atlas, as one Parquet file."""
    import subprocess

    from clipray.runner.atlas import command_of, write_atlas

    written = write_atlas(run, to, table=table, thumbnail_px=thumbnail_px, say=err.print)
    out.print(f"{written.path}: {written.rows:,} rows")
    command = command_of(written) if start else None
    if command is not None:
        raise typer.Exit(subprocess.run(command, check=False).returncode)
    if start:
        err.print('embedding-atlas is not installed: pip install "clipray[atlas]"')
    out.print(f"embedding-atlas {shlex.join(written.arguments)}")
