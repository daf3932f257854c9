"""Verbs that hand jobs to a Ray cluster."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from clipray.cli.app import Fresh, JobServer, NoRetry, RetryRejects, app, err, out
from clipray.runner.printing import shown


@app.command(rich_help_panel="Cluster")
def submit(
    job: Annotated[str, typer.Argument(help="Job file in the working directory, or its URL.")],
    address: JobServer,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for its end.")] = False,
    requirements: Annotated[
        str | None, typer.Option(help="File of packages to install on the nodes first, as for pip.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="What else stays here, as in a .gitignore; may be repeated.")
    ] = None,
    fresh: Fresh = None,  # type: ignore[assignment]
    retry_rejects: RetryRejects = False,
    no_retry: NoRetry = False,
) -> None:
    """Run a job on a Ray cluster and follow it.

    A job that is submitted again goes on; one that is running is followed.
    """
    from clipray.runner.submit import submit as send

    options = [word for table in fresh or [] for word in ("--fresh", table)]
    options += ["--retry-rejects"] * retry_rejects + ["--no-retry"] * no_retry
    code = send(
        job, address, say=err.print, write=write, detach=detach, requirements=requirements,
        exclude=exclude or [], options=options,
    )  # fmt: skip
    raise typer.Exit(code)


@app.command(rich_help_panel="Cluster")
def stop(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Output folder of a job that was submitted.")],
    address: JobServer,
) -> None:
    """Stop a submitted run.

    It writes the rows that are finished, and goes on when it is submitted again.
    """
    from clipray.runner.submit import stop as end

    attempt = end(run, address)
    out.print(f"{attempt.id}: {attempt.state.lower()}")


def write(text: str) -> None:
    sys.stdout.write(shown(text))
    sys.stdout.flush()
