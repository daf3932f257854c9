"""Verbs that run jobs on this machine and inspect runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipray.cli.app import (
    Fresh,
    IdColumn,
    ImagesFolder,
    LabelColumn,
    ModelName,
    NoRetry,
    Pretrained,
    RetryRejects,
    Seed,
    UriColumn,
    app,
    err,
    model_settings,
    out,
)
from clipray.runner.printing import Display, PlainTable

if TYPE_CHECKING:
    from clipray.runner.status import TableStatus
    from clipray.runner.verify import TableCheck

Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to run on: auto (the one this node belongs to) or HOST:PORT of its head; default: RAY_ADDRESS, else this machine."
    ),
]
JobServerIfAny = Annotated[
    str | None,
    typer.Option(
        help="The job server of the cluster to which the run was submitted: http://HEAD:8265.",
        envvar="RAY_API_SERVER_ADDRESS",
    ),
]


@app.command(rich_help_panel="Run")
def run(
    job: Annotated[str, typer.Argument(help="Job file, local or any URL.")],
    fresh: Fresh = None,  # type: ignore[assignment]
    retry_rejects: RetryRejects = False,
    no_retry: NoRetry = False,
    address: Address = None,
) -> None:
    """Run the unfinished steps of a job."""
    _print_pages(_run_job(job, fresh=fresh or [], retry_rejects=retry_rejects, retry=not no_retry, address=address))


@app.command(rich_help_panel="Run")
def embed(
    images: Annotated[str, typer.Argument(help="Folder or glob of images, a list of them, tars, or Parquet.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the job file and its tables.")],
    model: ModelName = "ViT-B-32",
    pretrained: Pretrained = None,
    seed: Seed = None,
    label: LabelColumn = None,
    uri: UriColumn = None,
    image_id: IdColumn = None,
    folder: ImagesFolder = None,
    keep: Annotated[list[str] | None, typer.Option(help="Column to carry through; may be given several times.")] = None,
    address: Address = None,
) -> None:
    """Embed images as they lie: write OUT/job.yaml and run it."""
    from clipray.inputs.image_lists import ListOptions
    from clipray.runner.embed import EmbedRequest, write_embed_job

    spec, columns = model_settings(model, pretrained, seed), ListOptions(uri, image_id, folder)
    path = write_embed_job(EmbedRequest(images, output, spec, label, columns, keep or ()), say=err.print)
    out.print(f"job file: {path}")
    _print_pages(_run_job(path, address=address))


@app.command(rich_help_panel="Run")
def plan(
    job: Annotated[str, typer.Argument(help="Job file.")],
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to plan for: auto, HOST:PORT, or its job server, http://HEAD:8265.")
    ] = None,
) -> None:
    """Show what a run would do, what is stale, and why.

    Prints rows, bytes, actors and CPUs, and which tables are finished.
    """
    from clipray.runner.plan import plan_job

    if address and address.startswith(("http://", "https://")):
        from clipray.cli.cluster import write
        from clipray.runner.submit import plan as plan_there

        raise typer.Exit(plan_there(job, address, write=write))
    statuses, lines = plan_job(job, address=address)
    _print_statuses(statuses)
    for text in lines:
        out.print(text)


@app.command(rich_help_panel="Look")
def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Output folder of a job.")],
    address: JobServerIfAny = None,
) -> None:
    """Show how far a run has come, from its files alone.

    With --address, also print what the cluster says.
    """
    from clipray.runner.status import status as look

    if address:
        from clipray.runner.submit import state

        attempt = state(run, address)
        text = f"{attempt.id}: {attempt.state.lower()}" if attempt else f"was not submitted to {address}"
        out.print(text)
    _print_statuses(look(run))


@app.command(rich_help_panel="Look")
def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Output folder of a job.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Read every byte of a run and list what is broken.

    Also prints what the next run makes again. The exit code is 1 where anything is broken.
    """
    from clipray.runner.verify import verify as check

    checks = check(run)
    broken = any(table.broken for table in checks)
    if as_json:
        print(json.dumps({"run": run, "whole": not broken, "tables": [asdict(table) for table in checks]}, indent=2))
    else:
        _print_checks(checks)
    raise typer.Exit(1 if broken else 0)


@app.command(rich_help_panel="Look")
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Output folder of a job.")],
    title: Annotated[str | None, typer.Option(help="Title of the page. [default: the job's name]")] = None,
) -> None:
    """Make an HTML page of what a run wrote."""
    from clipray.runner.report import write_report

    _print_pages([write_report(run, title=title)])


@app.command(rich_help_panel="Run")
def demo(
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the images and the tables.")] = "runs/demo",
) -> None:
    """Draw a small world and run a whole job on it.

    Runs jobs/demo.yaml and shows the result. Needs no network.
    """
    from clipray.demo.tour import look_at_clusters, nearest_images, style_figures, write_cluster_images, write_demo

    job = write_demo(output)
    out.print(f"images: {output}/world/pictures, job file: {job}")
    pages = _run_job(job)
    shown, same = nearest_images(f"{output}/images")
    listing = PlainTable("image", "nearest by cosine", title="What the vectors know")
    for image in shown:
        listing.add_row(image.caption, "; ".join(f"{caption} ({cosine:.2f})" for caption, cosine in image.nearest))
    out.print(listing)
    out.print(f"The nearest other image of a single thing shows the same thing for {same:.0%} of them.")
    views = look_at_clusters(output)
    listing = PlainTable("cluster", "images", "commonest word of the labels", title="What K-means finds")
    for view in views[:6]:
        listing.add_row(str(view.cluster_id), str(view.size), "{} ({} of {})".format(*view.commonest, view.labelled))
    out.print(listing)
    sheet, plot = write_cluster_images(output, views)
    listing = PlainTable("images", "prompt style", "n", "top-1", "top-5", "calibration error", title="Zero-shot labels, 64 classes")  # fmt: skip
    for kind, style, n, figures in style_figures(f"{output}/label_figures"):
        listing.add_row(kind, style, str(n), *(f"{figures[name]:.1%}" for name in ("top1", "top5", "ece")))
    out.print(listing)
    out.print("Look next at:")
    for line in (
        f"  {sheet}, {plot} (typical images of each cluster; the first two principal components)",
        f"  {output}/label_figures_confusion/*.png (what was taken for what)",
        f'  clipray search {output} "a red circle"',
        f"  clipray status {output}",
        f"  clipray plan {job}",
        f"  duckdb -c \"select kind, count(*) from '{output}/images/*.parquet' group by kind\"",
        f"  {output}/images/_table.json (what made the table), {output}/events.jsonl (what happened)",
    ):
        out.print(line)
    out.print("And at all of it on one page, in a browser; or search and browse it there:")
    _print_pages(pages)
    out.print(f"  clipray serve {output}")


def _run_job(job: str, **options: Any) -> list[str]:
    """Run a job and print its tables. Returns the pages that it made."""
    from clipray.runner.run import run_job as run_job_file

    with Display(err) as display:
        statuses = run_job_file(job, watch=display.watch, notice=display.notice, **options)
    _print_statuses(statuses)
    return [status.page for status in statuses if status.page]


def _print_pages(pages: list[str]) -> None:
    for page in pages:
        out.print(f"report: {page}")


def _print_statuses(statuses: list[TableStatus]) -> None:
    listing = PlainTable("table", "state", "rows", "rejected", "of", "")
    for table in statuses:
        note = table.note
        if table.record and not note and table.record.seconds:
            note = f"{table.record.seconds:g} s"
            note += f", {table.record.rows_per_s:g} rows/s" if table.record.rows_per_s else ""
        total = "?" if table.total is None else str(table.total)
        listing.add_row(table.name, table.state, str(table.rows), str(table.rejected), total, note)
    out.print(listing)


def _print_checks(checks: list[TableCheck]) -> None:
    """The outcome of `clipray verify`: a line for each table, then one for each broken file."""
    listing = PlainTable("table", "state", "files", "rows", "without a hash")
    for check in checks:
        listing.add_row(check.name, check.state, str(check.files), str(check.rows), str(len(check.without_hash) or ""))
    out.print(listing)
    for check in checks:
        for file in check.broken:
            rows = "" if file.rows is None else f", {file.rows} rows"
            out.print(f"{check.name}/{file.file}{rows}: {file.problem}; {file.repair}")
        if check.note:
            out.print(f"{check.name}: not noted for the next run: {check.note}")
    before = [check.name for check in checks if check.without_hash]
    if before:
        out.print(f"made before hashes were recorded, so only what can be read was verified: {', '.join(before)}")
