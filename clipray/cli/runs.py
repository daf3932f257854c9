"""Verbs that run jobs on this machine and inspect runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from clipray.cli.app import (
    Address,
    Fresh,
    JobServerIfAny,
    LabelColumn,
    ModelName,
    NoRetry,
    Pretrained,
    RetryRejects,
    Seed,
    app,
    model_settings,
    out,
    print_checks,
    print_pages,
    print_statuses,
    run_job,
    say,
)
from clipray.runner.printing import PlainTable


@app.command(rich_help_panel="Run")
def run(
    job: Annotated[str, typer.Argument(help="Job file, local or any URL.")],
    fresh: Fresh = None,  # type: ignore[assignment]
    retry_rejects: RetryRejects = False,
    no_retry: NoRetry = False,
    address: Address = None,
) -> None:
    """Run the unfinished steps of a job."""
    print_pages(run_job(job, fresh=fresh or [], retry_rejects=retry_rejects, retry=not no_retry, address=address))


@app.command(rich_help_panel="Run")
def embed(
    images: Annotated[str, typer.Argument(help="Folder or glob of images, or a manifest.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the job file and its tables.")],
    model: ModelName = "ViT-B-32",
    pretrained: Pretrained = None,
    seed: Seed = None,
    label: LabelColumn = None,
    address: Address = None,
) -> None:
    """Embed a folder of images: write OUT/job.yaml and run it."""
    from clipray.runner.embed import write_embed_job

    spec = model_settings(model, pretrained, seed)
    path = write_embed_job(images, output, spec, label, say=say)
    out.print(f"job file: {path}")
    print_pages(run_job(path, address=address))


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
    print_statuses(statuses)
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
    print_statuses(look(run))


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
        print_checks(checks)
    raise typer.Exit(1 if broken else 0)


@app.command(rich_help_panel="Look")
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Output folder of a job.")],
    title: Annotated[str | None, typer.Option(help="Title of the page. [default: the job's name]")] = None,
) -> None:
    """Make an HTML page of what a run wrote."""
    from clipray.runner.report import write_report

    print_pages([write_report(run, title=title)])


@app.command(rich_help_panel="Run")
def demo(
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the images and the tables.")] = "runs/demo",
) -> None:
    """Draw a small world and run a whole job on it.

    Runs jobs/demo.yaml and shows the result. Needs no network.
    """
    from clipray.demo.clusters import look_at_clusters, write_cluster_images
    from clipray.demo.tour import nearest_images, style_figures, write_demo

    job = write_demo(output)
    out.print(f"images: {output}/world/pictures, job file: {job}")
    pages = run_job(job)
    shown, same = nearest_images(f"{output}/images")
    listing = PlainTable("image", "nearest by cosine", title="What the vectors know", title_justify="left")
    for image in shown:
        listing.add_row(image.caption, "; ".join(f"{caption} ({cosine:.2f})" for caption, cosine in image.nearest))
    out.print(listing)
    out.print(f"The nearest other image of a single thing shows the same thing for {same:.0%} of them.")
    views = look_at_clusters(output)
    listing = PlainTable(
        "cluster", "images", "commonest word of the labels", title="What K-means finds", title_justify="left"
    )
    for view in views[:6]:
        listing.add_row(str(view.cluster_id), str(view.size), "{} ({} of {})".format(*view.commonest, view.labelled))
    out.print(listing)
    sheet, plot = write_cluster_images(output, views)
    listing = PlainTable("images", "prompt style", "n", "top-1", "top-5", "calibration error", title="Zero-shot labels, 64 classes", title_justify="left")  # fmt: skip
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
    out.print("And at all of it on one page, in a browser:")
    print_pages(pages)
