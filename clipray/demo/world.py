"""Writes a demo world to a folder: images, manifests, class lists and retrieval ground truth.

The files are plain JPEG, Parquet and YAML. `uri` in `images.parquet` is relative to that file. The same arguments give
the same images and rows; seeds from `TRAINING_SEEDS_FROM` on are the ones that the demo model was trained with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clipray.demo import prompts
from clipray.demo.places import Relation, draw_view, sample_place, sample_view
from clipray.demo.scenes import Scene, contradicting_word, draw, sample_scene, with_word

TRAINING_SEEDS_FROM = 1_000_000
JPEG_QUALITY = 92
_LABEL_STRIDE = 27  # coprime with 64: every class in turn, colours and shapes mixed
_VIEWS: tuple[tuple[Relation, int], ...] = (("easy", 2), ("hard", 3), ("junk", 1))  # beside the query itself


def _strings(*names: str) -> pa.Schema:
    return pa.schema([pa.field(name, pa.string(), nullable=False) for name in names])


_STRINGS, _BOXES = pa.list_(pa.string()), pa.list_(pa.list_(pa.float32(), 4))
IMAGES_SCHEMA = pa.schema(
    [
        *_strings("image_id", "uri", "kind", "split"),
        pa.field("label", pa.string()),
        *_strings("caption"),
        pa.field("captions", _STRINGS, nullable=False),
        pa.field("boxes", _BOXES),
        pa.field("box_captions", _STRINGS),
        pa.field("box_labels", _STRINGS),
        pa.field("word", pa.string()),
        pa.field("place_id", pa.string()),
    ]
)
TEXTS_SCHEMA = _strings("text_id", "text", "image_id")
PAIRS_SCHEMA = pa.schema(
    [
        *_strings("pair_id", "image_id", "caption"),
        pa.field("references", _STRINGS, nullable=False),
        pa.field("fits", pa.bool_(), nullable=False),
    ]
)
GROUPS_SCHEMA = pa.schema(
    [
        *_strings("image_id", "uri"),
        *(IMAGES_SCHEMA.field(name).with_nullable(False) for name in ("boxes", "box_captions", "box_labels")),
    ]
)
LABELLED_SCHEMA = _strings("image_id", "uri", "label")
QUERIES_SCHEMA = _strings("query_id", "image_id", "relation")
CLASSES_SCHEMA = _strings("label", "style", "prompt")


@dataclass(frozen=True)
class DemoWorld:
    """Where the files of a written world are."""

    folder: Path
    images: Path
    texts: Path
    pairs: Path
    labelled: Path
    groups: Path
    classes: Path
    classes_yaml: Path
    queries: Path
    n_images: int


@dataclass(frozen=True)
class _Entry:
    """An image to write and its row of `images.parquet`."""

    pixels: np.ndarray
    row: dict[str, Any]


def _scene_entry(scene: Scene, name: str, side_px: int) -> _Entry:
    drawing = draw(scene, side_px)
    row: dict[str, Any] = {
        "image_id": f"{name}-{scene.index:05d}",
        "kind": name,
        "split": "test" if scene.index % 5 == 4 else "train",
        "label": scene.label,
        "captions": list(scene.captions),
        "boxes": drawing.boxes.tolist(),
        "box_captions": list(drawing.box_captions),
        "box_labels": [thing.label for thing in scene.things],
        "word": scene.word,
    }
    return _Entry(drawing.pixels, row)


def _single(seed: int, index: int) -> Scene:
    labels = prompts.class_labels()
    return sample_scene(seed, index, label=labels[index * _LABEL_STRIDE % len(labels)])


def _scene_entries(seed: int, *, n_scenes: int, n_groups: int, n_words: int, side_px: int) -> Iterator[_Entry]:
    for index in range(n_scenes):
        yield _scene_entry(_single(seed, index), "single", side_px)
    for index in range(n_groups):
        yield _scene_entry(sample_scene(seed, index, kind="group"), "group", side_px)
    for index in range(n_words):
        scene = _single(seed, index)
        yield _scene_entry(with_word(scene, contradicting_word(scene)), "word", side_px)


def _place_entries(seed: int, n_places: int, side_px: int) -> Iterator[_Entry]:
    for index in range(n_places):
        place = sample_place(seed, index)
        views = [("query", sample_view(place, 0, relation="easy"))]
        views += [(kind, sample_view(place, n, relation=kind)) for kind, count in _VIEWS for n in range(1, count + 1)]
        for role, view in views:
            row: dict[str, Any] = {
                "image_id": f"{place.place_id}-{role}-{view.number}",
                "kind": "place",
                "split": "query" if role == "query" else "gallery",
                "captions": list(place.captions),
                "place_id": place.place_id,
                "relation": role,
            }
            yield _Entry(draw_view(place, view, side_px), row)


def _pair_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Single things and groups, each with its own caption and with that of another of its kind."""
    pairs = []
    for kind in ("single", "group"):
        of_kind = [row for row in rows if row["kind"] == kind]
        for n, row in enumerate(of_kind):
            others = of_kind[n + 1 :] + of_kind[:n]
            other = next((r for r in others if r["label"] != row["label"] or kind == "group"), row)
            for fits, caption in ((True, row["caption"]), (False, other["caption"])):
                pairs.append(
                    {
                        "pair_id": f"{row['image_id']}-{'own' if fits else 'other'}",
                        "image_id": row["image_id"],
                        "caption": caption,
                        "references": row["captions"][1:],
                        "fits": fits,
                    }
                )
    return pairs


def _class_rows() -> list[dict[str, str]]:
    return [
        {"label": label, "style": style, "prompt": prompts.class_prompt(label, style)}
        for style in prompts.PROMPT_STYLES
        for label in prompts.class_labels()
    ]


def _classes_yaml() -> str:
    """A class file as the step `label` takes it."""
    lines = ["names:", *(f"  - {label}" for label in prompts.class_labels())]
    lines += [f'templates: "{prompts.TEMPLATE}"', "descriptions:"]
    return "\n".join([*lines, *(f"  {label}: {prompts.definition(label)}" for label in prompts.class_labels())]) + "\n"


def _write_images(entries: Iterable[_Entry], folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for entry in entries:
        uri = f"pictures/{entry.row['image_id']}.jpg"
        Image.fromarray(entry.pixels).save(folder / uri, quality=JPEG_QUALITY, subsampling=0)
        rows.append({**entry.row, "uri": uri, "caption": entry.row["captions"][0]})
    return rows


def write_world(
    out_dir: str | Path,
    *,
    seed: int = 0,
    n_scenes: int = 256,
    n_groups: int = 64,
    n_words: int = 32,
    n_places: int = 16,
    side_px: int = 192,
) -> DemoWorld:
    """Write a world of `n_scenes` single things, groups, contradicting words and places (seven views each).

    `word-00007` shows what `single-00007` shows, with the name of another class written beside it. `side_px` is the height and width of the images. About 250 images a second on one core at 192 px.
    """
    folder = Path(out_dir)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)  # fails before anything is drawn
    scenes = _scene_entries(seed, n_scenes=n_scenes, n_groups=n_groups, n_words=n_words, side_px=side_px)
    rows = _write_images(chain(scenes, _place_entries(seed, n_places, side_px)), folder)
    texts = [
        {"text_id": f"{row['image_id']}-{n}", "text": text, "image_id": row["image_id"]}
        for row in rows
        for n, text in enumerate(row["captions"])
    ]
    queries = [{**row, "query_id": f"{row['place_id']}-query-0"} for row in rows if row["split"] == "gallery"]
    tables = {
        "images": (rows, IMAGES_SCHEMA),
        "texts": (texts, TEXTS_SCHEMA),
        "pairs": (_pair_rows(rows), PAIRS_SCHEMA),
        "labelled": ([row for row in rows if row["kind"] == "single"], LABELLED_SCHEMA),
        "groups": ([row for row in rows if row["kind"] == "group"], GROUPS_SCHEMA),
        "classes": (_class_rows(), CLASSES_SCHEMA),
        "queries": (queries, QUERIES_SCHEMA),
    }
    paths = {name: folder / f"{name}.parquet" for name in tables}
    for name, (members, schema) in tables.items():  # of a row, what its schema has
        pq.write_table(pa.Table.from_pylist(members, schema), paths[name], compression="zstd")
    classes_yaml = folder / "classes.yaml"
    classes_yaml.write_text(_classes_yaml(), encoding="utf-8")
    return DemoWorld(folder=folder, classes_yaml=classes_yaml, n_images=len(rows), **paths)
