"""`clipray search RUN QUERY`: answers of an index to one text or picture, at once, without Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipray import tables
from clipray.errors import JobError, ManifestError, ModelError, SchemaError
from clipray.inputs.index_reader import OpenIndex, index_record, open_index, refuse_stale_index
from clipray.inputs.vector_column import layer_of
from clipray.job import SCHEMES, Model
from clipray.storage.environment import environment_errors
from clipray.storage.folder import Folder, absolute
from clipray.storage.uris import is_relative


@dataclass(frozen=True)
class Hit:
    """An answer.

    Attributes:
        score: cosine or dot product, the larger the nearer; by `metric: l2` the squared distance.
        uri: path or URL of the picture, "" where no table of the run knows it.
        region_id, box: of a region: its id and x1, y1, x2, y2 in px of the picture.
    """

    rank: int
    image_id: str
    score: float
    uri: str = ""
    region_id: str | None = None
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Answer:
    """The hits, the nearest first, and of which index with which metric."""

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
        text, image, like: the query, one of them: words, the path or URL of a picture, or the id of an indexed row.
        index: the index's table; by default the only one. by_region: the only one over regions.
        model: that of the index, where its record does not say where to find it.

    Raises:
        JobError: not one query; no such index, or more than one.
        SchemaError: the index is stale, or holds vectors that texts and pictures cannot be compared with.
        ModelError, ManifestError: the model or the picture cannot be had.
    """
    given = [query for query in (text, image, like) if query is not None]
    if len(given) != 1 or not given[0].strip():
        raise JobError("expected one query: words, --image PATH or --like ID")
    output = Folder(absolute(run))
    name = index or _only_index(output, by_region)
    refuse_stale_index(name, index_record(name, output.sub(name)), output)
    opened = open_index(name, output.sub(name))
    query = _vector_of(opened, like) if like is not None else _encoded(opened, text, image, model)
    scores, numbers = opened.search(query, top + (like is not None))
    found = [(float(s), int(n)) for s, n in zip(scores[0], numbers[0], strict=True) if n >= 0]
    if like is not None:
        own = opened.ids.column_names[-1]
        found = [(s, n) for s, n in found if opened.ids[own][n].as_py() != like][:top]
    return Answer(_hits(opened, output, found), name, opened.metric)


def _only_index(output: Folder, by_region: bool) -> str:
    records = {name: tables.read_record(output.sub(name)) for name in output.folders()}
    found = [n for n, r in records.items() if r and r.table == "index" and ("region_id" in r.columns) == by_region]
    if len(found) == 1:
        return found[0]
    kind = "index over regions" if by_region else "index"
    if found:
        raise JobError(f"{output.url}: there are several: {', '.join(found)}; choose one with --index")
    raise JobError(f"{output.url}: no finished {kind} there; a job's step `index: {{input: images.clip}}` makes one")


def _vector_of(opened: OpenIndex, like: str) -> np.ndarray:
    names = opened.ids[opened.ids.column_names[-1]].to_pylist()
    if like not in names:
        raise JobError(f"--like {like}: index {opened.name} has no such row; it has {names[0]!r}, …")
    return opened.vector(names.index(like))[None]


def _encoded(opened: OpenIndex, text: str | None, image: str | None, model: Model | None) -> np.ndarray:
    """The query's vector (1, d) by the index's own model."""
    made, space = opened.record.provenance.get("model"), opened.space
    layer = layer_of(space)
    if not made or layer != "output":
        held = f"components of {opened.record.inputs['input']}" if "reduce" in space else f"vectors of layer {layer!r}"
        held = held if made or "reduce" in space else "vectors of which no model is known"
        raise SchemaError(
            f"index {opened.name} holds {held}: words and new pictures cannot be compared with these; "
            "search with --like ID, or make an index over a model's `output`"
        )
    from clipray.models.resolve import resolve

    found = resolve(model or _model_of(made))
    if found.identity()["weights"] != made["weights"]:
        raise ModelError(f"index {opened.name} was made with other weights of {made['name']}: {made['weights'][:23]}…")
    if text is not None:
        from clipray.models.text_encoder import TextEncoder

        return TextEncoder(found, precision="fp32", batch_size=1).encode([text])[0]
    return _encoded_picture(found, str(image))


def _encoded_picture(found: Any, image: str) -> np.ndarray:
    from clipray.models.image_encoder import ImageEncoder
    from clipray.models.load import split_transform
    from clipray.pipelines.decode import DecodedImage, load_picture, prepare_pillow
    from clipray.pipelines.limits import Limits

    prepare_pillow()
    limits = Limits(schemes=SCHEMES)
    picture = load_picture(absolute(image), None, limits, split_transform(found, limits.max_pixels)[0])
    if not isinstance(picture, DecodedImage):
        raise ManifestError(f"--image {image}: {picture.reason}: {picture.message}")
    return ImageEncoder(found, precision="fp32", batch_size=1).encode(np.stack([picture.pixels])).vectors["clip"]


def _model_of(made: dict[str, Any]) -> Model:
    """The settings by which the model of a table is found again."""
    if made["name"] in ("demo", "demo-rn"):
        return Model(name=made["name"])
    if made.get("config"):
        raise JobError(
            f"the model {made['name']} has a config file of its own: name it with --model {made['config']} --pretrained …"
        )
    pretrained = "random" if str(made["weights"]).startswith("random:") else made["pretrained"]
    return Model(name=made["name"], pretrained=pretrained, seed=made["seed"])


def _hits(opened: OpenIndex, output: Folder, found: list[tuple[float, int]]) -> list[Hit]:
    rows = [opened.ids.slice(number, 1).to_pylist()[0] for _, number in found]  # `take` imports pandas, in 0.2 s
    pictures = [row.get("image_id", next(iter(row.values()))) for row in rows]
    uris, boxes = _uris(output, set(pictures)), _boxes(opened, output, {row.get("region_id") for row in rows})
    return [
        Hit(n + 1, pictures[n], score, uris.get(pictures[n], ""), rows[n].get("region_id"), boxes.get(rows[n].get("region_id")))
        for n, (score, _) in enumerate(found)
    ]  # fmt: skip


def _uris(output: Folder, wanted: set[str]) -> dict[str, str]:
    """Where the pictures lie, as the run's first table of pictures has it; relative ones lie beside the manifest."""
    for name in output.folders():
        record = tables.read_record(output.sub(name))
        if record is not None and record.table == "images":
            home = os.path.dirname(str((record.inputs.get("manifest") or [""])[0]))
            parts = tables.iter_table(output.sub(name).url, ["image_id", "uri"])
            rows = (row for part in parts for row in zip(*(column.to_pylist() for column in part.columns), strict=True))
            return {key: _placed(uri, home) for key, uri in rows if key in wanted and uri}
    return {}


def _placed(uri: str, home: str) -> str:
    return f"{home}/{uri}" if is_relative(uri) else uri


def _boxes(opened: OpenIndex, output: Folder, wanted: set[Any]) -> dict[Any, tuple[float, float, float, float]]:
    if "region_id" not in opened.ids.column_names:
        return {}
    source = str(opened.record.inputs["input"]).rpartition(".")[0]
    parts = tables.iter_table(output.sub(source or "regions").url, ["region_id", "box_xyxy"])
    rows = (row for part in parts for row in zip(*(column.to_pylist() for column in part.columns), strict=True))
    return {key: tuple(box) for key, box in rows if key in wanted}
