"""`clipray search RUN QUERY`: searches an index by one text, image or row, without Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from clipray import tables
from clipray.errors import JobError, ManifestError, ModelError, SchemaError
from clipray.inputs.index_reader import OpenIndex, index_record, open_index, refuse_stale_index
from clipray.inputs.vector_column import layer_of
from clipray.job import SCHEMES, Model
from clipray.storage.environment import environment_errors
from clipray.storage.folder import Folder, absolute
from clipray.storage.uris import is_relative
from clipray.tables.scan import scan_table

if TYPE_CHECKING:
    from clipray.models.resolve import ResolvedModel

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Hit:
    """An answer.

    Attributes:
        score: cosine or dot product, the larger the nearer; by `metric: l2` the squared distance.
        uri: path or URL of the image, "" where no table of the run knows it.
        region_id, box: of a region: its id and x1, y1, x2, y2 in px of the image.
    """

    rank: int
    image_id: str
    score: float
    uri: str = ""
    region_id: str | None = None
    box: Box | None = None


@dataclass(frozen=True)
class Answer:
    """The hits, nearest first, with the index and its metric."""

    hits: list[Hit]
    index: str
    metric: str


@environment_errors()
def search(
    run: str, text: str | None = None, *, image: str | None = None, like: str | None = None, index: str | None = None,
    by_region: bool = False, top: int = 12, model: Model | None = None,
) -> Answer:  # fmt: skip
    """Search an index of the run at `run`.

    Args:
        text, image, like: the query, one of them: words, the path or URL of an image, or the id of an indexed row.
        index: the index's table; by default the only one. by_region: the only one over regions.
        model: that of the index, where its record does not say where to find it.

    Raises:
        JobError: not one query; no such index, or more than one.
        SchemaError: the index is stale, or holds vectors that texts and images cannot be compared with.
        ModelError, ManifestError: the model or the image cannot be had.
    """
    queries = [query for query in (text, image, like) if query is not None]
    if len(queries) != 1 or not queries[0].strip():
        raise JobError("expected one query: words, --image PATH or --like ID")
    output = Folder(absolute(run))
    name = index or _only_index(output, by_region)
    refuse_stale_index(name, index_record(name, output.sub(name)), output)
    opened = open_index(name, output.sub(name))
    query = _vector_of(opened, like) if like is not None else _encoded(opened, text, image, model)
    scores, numbers = opened.search(query, top + (like is not None))
    nearest = [(float(s), int(n)) for s, n in zip(scores[0], numbers[0], strict=True) if n >= 0]
    if like is not None:
        names = opened.ids[opened.ids.column_names[-1]]
        nearest = [(s, n) for s, n in nearest if names[n].as_py() != like][:top]
    return Answer(_hits(opened, output, nearest), name, opened.metric)


def _only_index(output: Folder, by_region: bool) -> str:
    records = {name: tables.read_record(output.sub(name)) for name in output.folders()}
    names = [n for n, r in records.items() if r and r.table == "index" and ("region_id" in r.columns) == by_region]
    if len(names) == 1:
        return names[0]
    if names:
        raise JobError(f"{output.url}: there are several: {', '.join(names)}; choose one with --index")
    what = "index over regions" if by_region else "index"
    raise JobError(f"{output.url}: no finished {what} there; a job's step `index: {{input: images.clip}}` makes one")


def _vector_of(opened: OpenIndex, like: str) -> np.ndarray:
    names = opened.ids[opened.ids.column_names[-1]].to_pylist()
    if like not in names:
        raise JobError(f"--like {like}: index {opened.name} has no such row; it has {names[0]!r}, …")
    return opened.vector(names.index(like))[None]


def _encoded(opened: OpenIndex, text: str | None, image: str | None, model: Model | None) -> np.ndarray:
    """The query's vector (1, d) by the index's own model."""
    recorded, space = opened.record.provenance.get("model"), opened.space
    layer = layer_of(space)
    if not recorded or layer != "output":
        held = f"components of {opened.record.inputs['input']}" if "reduce" in space else f"vectors of layer {layer!r}"
        held = held if recorded or "reduce" in space else "vectors of which no model is known"
        raise SchemaError(
            f"index {opened.name} holds {held}: words and new images cannot be compared with these; "
            "search with --like ID, or make an index over a model's `output`"
        )
    from clipray.models.resolve import resolve

    resolved = resolve(model or _model_of(recorded))
    if resolved.identity()["weights"] != recorded["weights"]:
        raise ModelError(
            f"index {opened.name} was made with other weights of {recorded['name']}: {recorded['weights'][:23]}…"
        )
    if text is not None and not resolved.has_text:
        raise ModelError(
            f"index {opened.name} is of {resolved.name}, a vision model without a text tower: "
            "search with --image PATH or --like ID"
        )
    if text is not None:
        from clipray.models.text_encoder import TextEncoder

        return TextEncoder(resolved, precision="fp32", batch_size=1).encode([text])[0]
    return _encoded_image(resolved, str(image))


def _encoded_image(model: ResolvedModel, path: str) -> np.ndarray:
    from clipray.models.image_encoder import ImageEncoder
    from clipray.models.preprocess import preprocess_of
    from clipray.pipelines.decode import DecodedImage, load_image, prepare_pillow
    from clipray.pipelines.spec import Limits

    prepare_pillow()
    limits = Limits(schemes=SCHEMES)
    image = load_image(absolute(path), None, limits, preprocess_of(model, limits.max_pixels))
    if not isinstance(image, DecodedImage):
        raise ManifestError(f"--image {path}: {image.reason}: {image.message}")
    return ImageEncoder(model, precision="fp32", batch_size=1).encode(np.stack([image.pixels])).vectors["clip"]


def _model_of(recorded: dict[str, Any]) -> Model:
    """The settings of the model in a table's record."""
    if recorded["name"] in ("demo", "demo-rn"):
        return Model(name=recorded["name"])
    if recorded.get("config"):
        raise JobError(
            f"the model {recorded['name']} has a config file of its own: name it with --model {recorded['config']} --pretrained …"
        )
    pretrained = "random" if str(recorded["weights"]).startswith("random:") else recorded["pretrained"]
    return Model(name=recorded["name"], pretrained=pretrained, seed=recorded["seed"])


def _hits(opened: OpenIndex, output: Folder, nearest: list[tuple[float, int]]) -> list[Hit]:
    rows = [opened.ids.slice(number, 1).to_pylist()[0] for _, number in nearest]  # `take` imports pandas, in 0.2 s
    images = [row.get("image_id", next(iter(row.values()))) for row in rows]
    regions = [row.get("region_id") for row in rows]
    uris, boxes = _uris(output, images), _boxes(opened, output, regions)
    return [
        Hit(n + 1, images[n], score, uris.get(images[n], ""), regions[n], boxes.get(regions[n]))
        for n, (score, _) in enumerate(nearest)
    ]


def _uris(output: Folder, images: list[str]) -> dict[str, str]:
    """URIs of images from the run's first table of images. Relative ones are resolved against the manifest."""
    for name in output.folders():
        record = tables.read_record(output.sub(name))
        if record is not None and record.table == "images":
            home = os.path.dirname(str((record.inputs.get("manifest") or [""])[0]))
            rows = _rows(output.sub(name), "image_id", images, "uri")
            return {image: f"{home}/{uri}" if is_relative(uri) else uri for image, uri in rows if uri}
    return {}


def _boxes(opened: OpenIndex, output: Folder, regions: list[str | None]) -> dict[str | None, Box]:
    if "region_id" not in opened.ids.column_names:
        return {}
    source = str(opened.record.inputs["input"]).rpartition(".")[0]
    return {
        region: tuple(box) for region, box in _rows(output.sub(source or "regions"), "region_id", regions, "box_xyxy")
    }


def _rows(table: Folder, key: str, names: list[Any], column: str) -> Iterator[tuple[Any, Any]]:
    """Name and value of the rows with these names."""
    rows = scan_table(table.url, [key, column]).filter(pl.col(key).is_in(names)).select(key, column)
    return rows.collect(engine="streaming").iter_rows()
