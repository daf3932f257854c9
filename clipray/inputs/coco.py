"""Images, boxes and captions of COCO's JSON (Lin et al. 2014, arXiv 1405.0312; format: cocodataset.org/#format-data)."""

from __future__ import annotations

import json
import posixpath
import re
from typing import Any

import polars as pl

from clipray.errors import ManifestError
from clipray.storage.folder import filesystem, split

SPLIT = re.compile(r"_([A-Za-z]+\d+)\.json$")  # of annotations/instances_val2017.json beside val2017/
BOXES = pl.List(pl.List(pl.Float32))
TEXTS = pl.List(pl.String)


def coco_images(source: str, data: bytes, images: str | None) -> tuple[pl.DataFrame, str, str]:
    """(a row for each image, the folder of their URIs, what was left out).

    Columns: `image_id`, `uri`; with instances `boxes` ([x1, y1, x2, y2] in px), `box_ids`, `box_labels` and `box_captions`
    (both the category's name), as `embed_regions` and `refer` read them; with captions `captions`.

    Args:
        images: the folder of the images; None: where COCO's archives have it, or the addresses in the file.

    Raises:
        ManifestError: not COCO's JSON, no images in it, or no folder where they are.
    """
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ManifestError(f"{source}: expected COCO's JSON: {error}") from error
    entries = content.get("images") if isinstance(content, dict) else None
    if not entries or not isinstance(entries, list) or not all(_is_image(entry) for entry in entries):
        raise ManifestError(f"{source}: expected COCO's JSON, with `images` that have an `id` and a `file_name`")
    annotations = content.get("annotations") or []
    if not isinstance(annotations, list) or not all(_is_annotation(entry) for entry in annotations):
        raise ManifestError(
            f"{source}: expected `annotations` to be a list of objects with an `image_id`, and `bbox` of four numbers"
        )
    folder = images or _folder(source, entries)
    ids = [str(entry["id"]) for entry in entries]
    columns: dict[str, Any] = {
        "image_id": pl.Series(ids, dtype=pl.String),
        "uri": pl.Series([entry["file_name"] if folder else entry["coco_url"] for entry in entries], dtype=pl.String),
    }
    captions = [entry for entry in annotations if "caption" in entry]
    if captions:
        columns["captions"] = _by_image(ids, [(entry["image_id"], entry["caption"]) for entry in captions], TEXTS)
    boxed = [entry for entry in annotations if entry.get("bbox")]
    drawn = [entry for entry in boxed if entry["bbox"][2] > 0 and entry["bbox"][3] > 0]
    if drawn:
        names = {category.get("id"): category.get("name") for category in content.get("categories") or ()}
        of_boxes = {
            "boxes": (_corners, BOXES),
            "box_ids": (lambda entry: str(entry.get("id", "")), TEXTS),
            "box_labels": (lambda entry: names.get(entry.get("category_id")), TEXTS),
            "box_captions": (lambda entry: names.get(entry.get("category_id")), TEXTS),
        }
        for name, (value_of, dtype) in of_boxes.items():
            columns[name] = _by_image(ids, [(entry["image_id"], value_of(entry)) for entry in drawn], dtype)
    note = f"{len(boxed) - len(drawn)} boxes without an area left out" if len(boxed) > len(drawn) else ""
    return pl.DataFrame(columns), folder or split(source)[0], note


def _is_image(entry: Any) -> bool:
    return isinstance(entry, dict) and "id" in entry and isinstance(entry.get("file_name"), str)


def _is_annotation(entry: Any) -> bool:
    box = entry.get("bbox") or [0] * 4 if isinstance(entry, dict) and "image_id" in entry else None
    return isinstance(box, list) and len(box) == 4 and all(isinstance(value, (int, float)) for value in box)


def _folder(source: str, entries: list[dict[str, Any]]) -> str | None:
    """Where the first image is: beside the JSON, in its split's folder beside it, or one level up; None: all have addresses."""
    beside, name = split(source)
    above = split(beside)[0]
    of_split = SPLIT.search(name)
    first = entries[0]
    folders = [beside, *(f"{parent}/{of_split[1]}" for parent in (beside, above) if of_split), above]
    for folder in folders:
        fs, path = filesystem(posixpath.join(folder, first["file_name"]))
        if fs.exists(path):
            return folder
    if all("coco_url" in entry for entry in entries):
        return None
    raise ManifestError(
        f"{source}: no image {first['file_name']!r} in {', '.join(folders)}; name their folder with `--images FOLDER`"
    )


def _corners(entry: dict[str, Any]) -> list[float]:
    x, y, width, height = entry["bbox"]
    return [x, y, x + width, y + height]


def _by_image(ids: list[str], pairs: list[tuple[Any, Any]], dtype: pl.DataType) -> pl.Series:
    """The values of each image, in the order of `ids`; an empty list where it has none."""
    lists: dict[str, list[Any]] = {image_id: [] for image_id in ids}
    for image_id, value in pairs:
        if str(image_id) in lists:
            lists[str(image_id)].append(value)
    return pl.Series([lists[image_id] for image_id in ids], dtype=dtype)
