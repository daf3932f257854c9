"""The command `clipray`: one short function per verb; the work is in the library."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clipray import __version__
from clipray.errors import ClipRayError, JobError, Stopped

app = typer.Typer(
    name="clipray",
    help="A Parquet manifest of pictures in, tables that people can query out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to run on: auto (the one this node belongs to) or HOST:PORT of its head; default: RAY_ADDRESS, else this machine."
    ),
]
JobServer = Annotated[
    str, typer.Option(help="The cluster's job server: http://HEAD:8265.", envvar="RAY_API_SERVER_ADDRESS")
]
JobServerIfAny = Annotated[
    str | None,
    typer.Option(
        help="The job server of the cluster to which the run was submitted: http://HEAD:8265.",
        envvar="RAY_API_SERVER_ADDRESS",
    ),
]
Fresh = Annotated[list[str], typer.Option(help="Delete this table and make it anew; may be repeated.")]
RetryRejects = Annotated[bool, typer.Option("--retry-rejects", help="Try the rejected rows of an earlier run again.")]


def _version(value: bool) -> None:
    if value:
        out.print(f"clipray {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    job: Annotated[str, typer.Argument(help="Job file, local or any URL.")],
    fresh: Fresh = None,  # type: ignore[assignment]
    retry_rejects: RetryRejects = False,
    address: Address = None,
) -> None:
    """Run what is not finished of a job."""
    _print_pages(_run(job, fresh=fresh or [], retry_rejects=retry_rejects, address=address))


@app.command()
def embed(
    pictures: Annotated[str, typer.Argument(help="Folder or glob of pictures, or a manifest.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the job file and its tables.")],
    model: Annotated[
        str, typer.Option(help="open_clip model name, hf-hub:…, local-dir:…, config file, or demo.")
    ] = "ViT-B-32",
    pretrained: Annotated[
        str | None, typer.Option(help="Tag, checkpoint path or URL, or random. [default: openai for ViT-B-32]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random weights.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Column `label`: `folder`, or a regular expression on image_id.")
    ] = None,
    address: Address = None,
) -> None:
    """Embed a folder of pictures in one line: writes OUT/job.yaml and runs it."""
    from clipray.oneline import write_embed_job

    spec = _model(model, pretrained, seed)
    path = write_embed_job(pictures, output, spec, label)
    out.print(f"job file: {path}", soft_wrap=True)
    _print_pages(_run(path, address=address))


@app.command()
def plan(job: Annotated[str, typer.Argument(help="Job file.")], address: Address = None) -> None:
    """What a run would do: rows, bytes, actors and CPUs, what is finished, what is stale and why."""
    from clipray import runner

    reports, lines = runner.plan(job, address=address)
    _print_reports(reports)
    for text in lines:
        out.print(text, soft_wrap=True, markup=False)


@app.command()
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
) -> None:
    """Run a job on a Ray cluster and follow it; submitted again, it goes on, or is followed where it is at work."""
    from clipray.submit import submit as send

    options = [word for table in fresh or [] for word in ("--fresh", table)] + ["--retry-rejects"] * retry_rejects
    code = send(
        job, address, say=_say, write=_write, detach=detach, requirements=requirements,
        exclude=exclude or [], options=options,
    )  # fmt: skip
    raise typer.Exit(code)


@app.command()
def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Output folder of a job.")],
    address: JobServerIfAny = None,
) -> None:
    """Where a run stands, from its files alone; with --address also what the cluster says of it."""
    from clipray.status import status as look

    if address:
        from clipray.submit import state

        attempt = state(run, address)
        said = f"{attempt.id}: {attempt.state.lower()}" if attempt else f"was not submitted to {address}"
        out.print(said, soft_wrap=True, markup=False)
    _print_reports(look(run))


@app.command()
def stop(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Output folder of a job that was submitted.")],
    address: JobServer,
) -> None:
    """Stop a run on a Ray cluster; it writes what is finished, and goes on when it is submitted again."""
    from clipray.submit import stop as end

    attempt = end(run, address)
    out.print(f"{attempt.id}: {attempt.state.lower()}", soft_wrap=True, markup=False)


@app.command()
def manifest(
    pictures: Annotated[str, typer.Argument(help="Folder or glob of pictures, local or any URL.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Parquet file to write.")],
    label: Annotated[
        str | None, typer.Option(help="Column `label`: `folder`, or a regular expression on image_id.")
    ] = None,
) -> None:
    """Make a manifest of a folder of pictures."""
    from clipray.manifest import make_manifest

    if not output.endswith((".parquet", ".pq")):
        raise JobError(f"{output}: a manifest's name ends in .parquet")
    count = make_manifest(pictures, output, label=label)
    out.print(f"{count} pictures in {output}", soft_wrap=True)


@app.command(name="ground-truth")
def ground_truth(
    source: Annotated[
        str,
        typer.Argument(metavar="IN", help="gnd_*.pkl, or a folder of *_query.txt, *_good.txt, *_ok.txt, *_junk.txt."),
    ],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Parquet file to write.")],
    prefix: Annotated[str, typer.Option(help="What an image_id has before the name in the ground truth.")] = "",
    suffix: Annotated[str, typer.Option(help="What it has after it.")] = ".jpg",
) -> None:
    """Make Parquet of the published ground truth of Oxford and Paris."""
    from clipray.ground_truth import convert_ground_truth

    if not output.endswith((".parquet", ".pq")):
        raise JobError(f"{output}: the name of a ground truth ends in .parquet")
    queries, rows = convert_ground_truth(source, output, prefix=prefix, suffix=suffix)
    out.print(f"{queries} queries, {rows} rows in {output}", soft_wrap=True)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Output folder of a job.")],
    title: Annotated[str | None, typer.Option(help="Title of the page. [default: the job's name]")] = None,
) -> None:
    """Make one page of HTML of what a run wrote, to look at in a browser."""
    from clipray import runner

    _print_pages([runner.report(run, title=title)])


@app.command()
def schema(
    table: Annotated[str | None, typer.Argument(help="Table type; without it, all are listed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Print the tables and their columns."""
    from clipray.tables import table_names, table_schema

    if table is None:
        listing = Table("table", "a row is")
        for name in table_names():
            listing.add_row(name, table_schema(name)["doc"])
        out.print(listing)
        return
    spec = table_schema(table)
    if as_json:
        print(json.dumps(spec, indent=2, ensure_ascii=False))
        return
    listing = Table(
        "column", "type", "null", "unit", "what it is", title=f"{table}: {spec['doc']}", title_justify="left"
    )
    for column in spec["columns"]:
        values = f" One of: {', '.join(column['values'])}." if "values" in column else ""
        listing.add_row(
            column["name"],
            column["type"],
            "yes" if column["nullable"] else "no",
            column.get("unit", ""),
            column["doc"] + values,
        )
    out.print(listing)


@app.command()
def layers(
    model: Annotated[str, typer.Argument(help="open_clip model name, hf-hub:…, local-dir:…, config file, or demo.")],
) -> None:
    """Print the layers of a model that a feature can name, and their shapes. Needs no weights."""
    from clipray.encoders.layers import shapes_without_weights
    from clipray.encoders.resolve import architecture

    found = architecture(model)
    height, width = found.image_size
    listing = Table(
        "layer", "shape", title=f"{model}: layers for pictures of {height} x {width} px", title_justify="left"
    )
    for layer, shape in shapes_without_weights(found).items():
        names = "" if len(shape) == 1 else " (channels x height x width)"
        listing.add_row(layer, " x ".join(map(str, shape)) + names)
    out.print(listing)


@app.command()
def search(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Output folder of a job with an `index` step.")],
    query: Annotated[str | None, typer.Argument(help="What the picture should show.")] = None,
    image: Annotated[str | None, typer.Option(help="Search with a picture: its path or URL.")] = None,
    like: Annotated[str | None, typer.Option(help="Search with a row of the index: its id.")] = None,
    index: Annotated[str | None, typer.Option(help="Table of the index, where there are several.")] = None,
    by_region: Annotated[bool, typer.Option("--by-region", help="Search an index over regions.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Number of answers.")] = 12,
    model: Annotated[str | None, typer.Option(help="The index's model, where it has a config file of its own.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="The checkpoint of --model.")] = None,
    html: Annotated[str | None, typer.Option(help="Write a page with the pictures to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON: a list of hits.")] = False,
) -> None:
    """Search an index with words, a picture or one of its rows, without Ray."""
    from dataclasses import asdict

    from clipray.quick_search import search as find
    from clipray.settings import Model

    spec = Model(name=model, pretrained=pretrained) if model else None
    answer = find(run, query, image=image, like=like, index=index, by_region=by_region, top=top, model=spec)
    if html:
        from clipray.search_page import search_page
        from clipray.storage import Folder

        title = query or (f"like {like}" if like else f"like the picture {image}")
        folder, _, name = html.rpartition("/")
        Folder(folder or ".").write(name, search_page(answer, title).encode())
        err.print(f"{html}: {len(answer.hits)} answers", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps([asdict(hit) for hit in answer.hits], indent=2, ensure_ascii=False))
        return
    listing = Table(
        "", "picture", "l2" if answer.metric == "l2" else answer.metric, "region" if by_region else "", "where"
    )
    for hit in answer.hits:
        box = "" if hit.box is None else f"{hit.region_id} [" + ", ".join(f"{side:.0f}" for side in hit.box) + "]"
        listing.add_row(str(hit.rank), escape(hit.image_id), f"{hit.score:.4f}", escape(box), escape(hit.uri))
    out.print(listing)


@app.command()
def label(
    pictures: Annotated[list[str], typer.Argument(metavar="PICTURE…", help="Pictures, folders or globs of them.")],
    classes: Annotated[
        str, typer.Option(help="`a dog, a cat`, a class file (.yaml, .parquet, .txt), cifar100 or imagenet.")
    ],
    top: Annotated[int, typer.Option(min=1, help="Labels to print of each picture.")] = 5,
    template: Annotated[
        str | None, typer.Option(help="What is said of a class, with {} where its name goes; or photo or openai.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="open_clip model name, hf-hub:…, local-dir:…, config file, or demo.")
    ] = "ViT-B-32",
    pretrained: Annotated[
        str | None, typer.Option(help="Tag, checkpoint path or URL, or random. [default: openai for ViT-B-32]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random weights.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, a line a picture.")] = False,
) -> None:
    """Label a few pictures at once, without Ray."""
    from clipray.quick_labels import label as look

    looks = look(pictures, classes, _model(model, pretrained, seed), template=template, top=top)
    if as_json:
        for seen in looks:
            labels = [{"label": name, "probability": round(p, 6)} for name, p in seen.labels]
            print(json.dumps({"picture": seen.picture, "labels": labels, "refused": seen.refused or None}))
        return
    listing = Table("picture", "label", "probability", "")
    for seen in looks:
        for n, (name, p) in enumerate(seen.labels):
            listing.add_row(
                "" if n else escape(seen.picture),
                escape(name),
                f"{p:.1%}",
                "█" * round(10 * p),
                end_section=n + 1 == len(seen.labels),
            )
        if seen.refused:
            listing.add_row(escape(seen.picture), f"[red]{escape(seen.refused)}[/]", "", "", end_section=True)
    out.print(listing)


@app.command()
def demo(
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the pictures and the tables.")] = "runs/demo",
) -> None:
    """Show the product on the built-in world: draws pictures, runs jobs/demo.yaml, looks at the result. Needs no network."""
    from clipray.demo.clusters import look_at_clusters, write_cluster_pictures
    from clipray.demo.tour import nearest_pictures, style_figures, write_demo

    job = write_demo(output)
    out.print(f"pictures: {output}/world/pictures, job file: {job}", soft_wrap=True)
    pages = _run(job)
    shown, same = nearest_pictures(f"{output}/images")
    listing = Table("picture", "nearest by cosine", title="What the vectors know", title_justify="left")
    for picture in shown:
        listing.add_row(picture.caption, "; ".join(f"{caption} ({cosine:.2f})" for caption, cosine in picture.nearest))
    out.print(listing)
    out.print(f"The nearest other picture of a single thing shows the same thing for {same:.0%} of them.")
    views = look_at_clusters(output)
    listing = Table(
        "cluster", "pictures", "commonest word of the labels", title="What K-means finds", title_justify="left"
    )
    for view in views[:6]:
        listing.add_row(str(view.cluster_id), str(view.size), "{} ({} of {})".format(*view.commonest, view.labelled))
    out.print(listing)
    sheet, plot = write_cluster_pictures(output, views)
    listing = Table("pictures", "prompt style", "n", "top-1", "top-5", "calibration error", title="Zero-shot labels, 64 classes", title_justify="left")  # fmt: skip
    for kind, style, n, figures in style_figures(f"{output}/label_figures"):
        listing.add_row(kind, style, str(n), *(f"{figures[name]:.1%}" for name in ("top1", "top5", "ece")))
    out.print(listing)
    out.print("Look next at:")
    for line in (
        f"  {sheet}, {plot} (typical pictures of each cluster; the first two principal components)",
        f"  {output}/label_figures_confusion/*.png (what was taken for what)",
        f"  clipray status {output}",
        f"  clipray plan {job}",
        f"  duckdb -c \"select kind, count(*) from '{output}/images/*.parquet' group by kind\"",
        f"  {output}/images/_table.json (what made the table), {output}/events.jsonl (what happened)",
    ):
        out.print(line, soft_wrap=True, markup=False)
    out.print("And at all of it on one page, in a browser:")
    _print_pages(pages)


def _model(name: str, pretrained: str | None, seed: int | None) -> Any:
    """The settings of a model that is named on the command line."""
    from pydantic import ValidationError

    from clipray.settings import Model

    if pretrained is None and name == "ViT-B-32":
        pretrained = "openai"
    try:
        return Model(name=name, pretrained=pretrained, seed=seed)
    except ValidationError as error:
        raise JobError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error


def _run(job: str, **options: Any) -> list[str]:
    """Run a job, say what became of it; the pages that it made."""
    from clipray import runner
    from clipray.display import Display

    with Display(err) as display:
        reports = runner.run(job, watch=display.watch, notice=display.notice, **options)
    _print_reports(reports)
    return [report.page for report in reports if report.page]


def _print_pages(pages: list[str]) -> None:
    for page in pages:
        out.print(f"report: {page}", soft_wrap=True, markup=False)


def _say(line: str) -> None:
    err.print(line, markup=False, soft_wrap=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_reports(reports: list[Any]) -> None:
    listing = Table("table", "state", "rows", "rejected", "of", "")
    for report in reports:
        note = report.note
        if report.record and not note and report.record.seconds:
            note = f"{report.record.seconds:g} s"
            note += f", {report.record.rows_per_s:g} rows/s" if report.record.rows_per_s else ""
        listing.add_row(
            report.name,
            report.state,
            str(report.rows),
            str(report.rejected),
            "?" if report.total is None else str(report.total),
            note,
        )
    out.print(listing)


def main() -> None:
    """Entry point: every expected error is one line (or one line per mistake) on stderr, and its exit code."""
    try:
        app(standalone_mode=True)
    except Stopped as error:
        err.print(str(error), markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except ClipRayError as error:
        err.print(f"clipray: {error}", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("stopped", markup=False)
        sys.exit(130)


if __name__ == "__main__":
    main()
