"""Verbs that query a run or images at once, without Ray, by a running server where there is one."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.text import Text

from clipray.cli.app import ModelName, Pretrained, Seed, app, err, model_settings, out
from clipray.runner.printing import PlainTable, shown


@app.command(rich_help_panel="Look")
def search(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Output folder of a job with an `index` step.")],
    query: Annotated[str | None, typer.Argument(help="What the image should show.")] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Search with an image: its path or URL; may be repeated.")
    ] = None,
    like: Annotated[
        list[str] | None, typer.Option(help="Search with a row of the index: its id; may be repeated.")
    ] = None,
    minus: Annotated[
        list[str] | None, typer.Option(help="Words that the answers should not be like; may be repeated.")
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="Answer with rows for which this is true: \"label = 'cat' and width > 500\".")
    ] = None,
    columns: Annotated[str, typer.Option(help="Show these columns of each answer: label,width.")] = "",
    index: Annotated[str | None, typer.Option(help="Table of the index, where there are several.")] = None,
    by_region: Annotated[bool, typer.Option("--by-region", help="Search an index over regions.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Number of answers.")] = 12,
    model: Annotated[str | None, typer.Option(help="The index's model, where it has a config file of its own.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="The checkpoint of --model.")] = None,
    html: Annotated[str | None, typer.Option(help="Write a page with the images to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON: a list of hits.")] = False,
) -> None:
    """Search an index by text, by an image or by a row's id."""
    from dataclasses import asdict

    from clipray.serve.quick import search as find

    spec = None
    if model:
        from clipray.job import Model

        spec = Model(name=model, pretrained=pretrained)
    names = [name.strip() for name in columns.split(",") if name.strip()]
    answer = find(
        run, query, image=image, like=like, minus=minus or (), where=where, columns=names, index=index,
        by_region=by_region, top=top, model=spec,
    )  # fmt: skip
    if html:
        from clipray.queries.search_page import search_page
        from clipray.storage.folder import Folder, split

        title = query or (f"like {', '.join(like)}" if like else f"like the image {', '.join(image or ())}")
        folder, name = split(html)
        Folder(folder).write(name, search_page(answer, title).encode())
        err.print(f"{html}: {len(answer.hits)} answers")
    if as_json:
        hits = [
            {name: value for name, value in asdict(hit).items() if names or name != "values"} for hit in answer.hits
        ]
        print(json.dumps(hits, indent=2, ensure_ascii=False, default=str))
        return
    listing = PlainTable(
        "",
        "image",
        "l2" if answer.metric == "l2" else answer.metric,
        "region" if by_region else "",
        "where",
        *map(shown, names),
    )
    for hit in answer.hits:
        box = "" if hit.box is None else f"{hit.region_id} [" + ", ".join(f"{side:.0f}" for side in hit.box) + "]"
        values = [_cell(hit.values[name]) for name in names]
        listing.add_row(str(hit.rank), hit.image_id, f"{hit.score:.4f}", box, hit.uri, *values)
    out.print(listing)


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


@app.command(rich_help_panel="Look")
def label(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE…", help="Images, folders or globs of them.")],
    classes: Annotated[
        str, typer.Option(help="`a dog, a cat`, a class file (.yaml, .parquet, .csv, .txt), cifar100 or imagenet.")
    ],
    top: Annotated[int, typer.Option(min=1, help="Labels to print of each image.")] = 5,
    template: Annotated[
        str | None, typer.Option(help="What is said of a class, with {} where its name goes; or photo or openai.")
    ] = None,
    model: ModelName = "ViT-B-32",
    pretrained: Pretrained = None,
    seed: Seed = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, a line for each image.")] = False,
) -> None:
    """Label a few images at once."""
    from clipray.serve.quick import label as label_images

    answers = label_images(images, classes, model_settings(model, pretrained, seed), template=template, top=top)
    if as_json:
        for answer in answers:
            labels = [{"label": name, "probability": round(p, 6)} for name, p in answer.labels]
            print(json.dumps({"picture": answer.image, "labels": labels, "refused": answer.rejected or None}))
        return
    listing = PlainTable("image", "label", "probability", "")
    for answer in answers:
        for n, (name, p) in enumerate(answer.labels):
            image, is_last = "" if n else answer.image, n + 1 == len(answer.labels)
            listing.add_row(image, name, f"{p:.1%}", "█" * round(10 * p), end_section=is_last)
        if answer.rejected:
            listing.add_row(answer.image, Text(shown(answer.rejected), style="red"), "", "", end_section=True)
    out.print(listing)
