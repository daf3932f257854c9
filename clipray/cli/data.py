"""Verbs about inputs: manifests, ground truth, tables, models."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from clipray.cli.app import MODEL, IdColumn, ImagesFolder, LabelColumn, UriColumn, app, err, out
from clipray.errors import JobError
from clipray.runner.printing import PlainTable


@app.command(rich_help_panel="Prepare")
def manifest(
    images: Annotated[
        str,
        typer.Argument(
            help="Folder or glob of images, or a list of them: .csv, .tsv, .jsonl, COCO's .json, .txt, `-`."
        ),
    ],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Parquet file to write.")],
    label: LabelColumn = None,
    uri: UriColumn = None,
    image_id: IdColumn = None,
    folder: ImagesFolder = None,
) -> None:
    """Make a manifest of a folder or a list of images."""
    from clipray.inputs.image_lists import ListOptions
    from clipray.inputs.make_manifest import make_manifest

    if not output.endswith((".parquet", ".pq")):
        raise JobError(f"{output}: a manifest's name ends in .parquet")
    count = make_manifest(images, output, label=label, options=ListOptions(uri, image_id, folder), say=err.print)
    out.print(f"{count} images in {output}")


@app.command(name="ground-truth", rich_help_panel="Prepare")
def ground_truth(
    source: Annotated[
        str,
        typer.Argument(metavar="IN", help="gnd_*.pkl, or a folder of *_query.txt, *_good.txt, *_ok.txt, *_junk.txt."),
    ],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Parquet file to write.")],
    prefix: Annotated[str, typer.Option(help="What an image_id has before the name in the ground truth.")] = "",
    suffix: Annotated[str, typer.Option(help="What it has after it.")] = ".jpg",
) -> None:
    """Convert the published ground truth of Oxford and Paris."""
    from clipray.inputs.published_ground_truth import convert_ground_truth

    if not output.endswith((".parquet", ".pq")):
        raise JobError(f"{output}: the name of a ground truth ends in .parquet")
    queries, rows = convert_ground_truth(source, output, prefix=prefix, suffix=suffix)
    out.print(f"{queries} queries, {rows} rows in {output}")


@app.command(rich_help_panel="Prepare")
def schema(
    table: Annotated[
        str | None, typer.Argument(help="Table type, or `job`; without it, all tables are listed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Print the columns of tables, or the JSON Schema of jobs.

    `clipray schema job` prints the schema that editors check job files with.
    """
    from clipray.job.json_schema import job_schema
    from clipray.tables import table_names, table_schema

    if table is None:
        listing = PlainTable("table", "a row is")
        for name in table_names():
            listing.add_row(name, table_schema(name)["doc"])
        out.print(listing)
        return
    if table == "job":
        print(json.dumps(job_schema(), indent=2, ensure_ascii=False))
        return
    if table not in table_names():
        raise JobError(f"no table {table!r}; there are: {', '.join(table_names())}")
    spec = table_schema(table)
    if as_json:
        print(json.dumps(spec, indent=2, ensure_ascii=False))
        return
    title = f"{table}: {spec['doc']}"
    listing = PlainTable("column", "type", "null", "unit", "what it is", title=title)
    for column in spec["columns"]:
        values = [*column["values"], *column.get("patterns", ())] if "values" in column else []
        doc = column["doc"] + (f" One of: {', '.join(values)}." if values else "")
        listing.add_row(
            column["name"], column["type"], "yes" if column["nullable"] else "no", column.get("unit", ""), doc
        )
    out.print(listing)


@app.command(rich_help_panel="Prepare")
def layers(
    model: Annotated[str, typer.Argument(help=MODEL)],
) -> None:
    """List the layers of a model and their shapes.

    Features of a job can name these layers. Needs no weights.
    """
    from clipray.models.layers import layer_shapes, tower_without_weights
    from clipray.models.resolve import architecture

    network = architecture(model)
    height, width = network.image_size
    listing = PlainTable("layer", "shape", title=f"{model}: layers for images of {height} x {width} px")
    for layer, shape in layer_shapes(tower_without_weights(network), network.image_size).items():
        names = "" if len(shape) == 1 else " (channels x height x width)"
        listing.add_row(layer, " x ".join(map(str, shape)) + names)
    out.print(listing)
