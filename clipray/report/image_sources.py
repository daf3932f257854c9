"""Where the images of rows lie, as the tables of a run know it, and their thumbnails."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from clipray.inputs.layout import Layout
from clipray.report.run_tables import RunTables
from clipray.report.thumbnails import ImageSource, Thumbnails, inline_images

THREADS = 4
Key = tuple[str, str]
"""An image's id, and that of one of its regions, or ""."""


def image_sources(run: RunTables, keys: Collection[Key]) -> tuple[dict[Key, ImageSource], dict[str, str]]:
    """Where images lie that a table knows, each once; and the known labels, by the images' ids."""
    sources: dict[str, ImageSource] = {}
    labels: dict[str, str] = {}
    names = {image_id for image_id, _ in keys}
    for table in run.known("images"):
        labelled = [run.label] if run.has_label(table) else []
        layout = Layout.of_facts(table.record.inputs.get("layout", {}))
        for row in table.where("image_id", names, "image_id", "uri", "height", "width", *labelled):
            manifests = () if row["uri"] else tuple(map(str, table.record.inputs.get("manifest", ())))
            size = row["width"], row["height"]
            sources[row["image_id"]] = ImageSource(row["image_id"], row["uri"], size, manifests, layout)
            if labelled and row[run.label] is not None:
                labels[row["image_id"]] = str(row[run.label])
    boxes = _boxes(run, {region_id for _, region_id in keys if region_id})
    of_keys = {key: replace(sources[key[0]], box=boxes.get(key[1])) for key in dict.fromkeys(keys) if key[0] in sources}
    return of_keys, labels


def _boxes(run: RunTables, regions: Collection[str]) -> dict[str, tuple[float, ...]]:
    return {
        row["region_id"]: tuple(row["box_xyxy"])
        for table in run.known("regions")
        for row in table.where("region_id", regions, "region_id", "box_xyxy")
    }


def thumbnails_of(
    sources: Mapping[Key, ImageSource], thumbnails: Thumbnails, threads: int = THREADS
) -> dict[Key, tuple[bytes | None, str]]:
    """Of each image its thumbnail as WebP, or None and why there is none; where nothing has its bytes it is left out.

    Manifests that hold images are read once, in one thread; other images are fetched in several.
    """
    webp: dict[Key, tuple[bytes | None, str]] = {}
    inline = {key: source for key, source in sources.items() if source.manifests}
    keys_of: dict[str, list[Key]] = {}
    for key in inline:
        keys_of.setdefault(key[0], []).append(key)
    for image_id, data in inline_images(inline.values()):
        webp |= {key: thumbnails.of_bytes(data, inline[key]) for key in keys_of[image_id]}
    placed = {key: source for key, source in sources.items() if source.uri}
    with ThreadPoolExecutor(threads) as pool:
        webp |= zip(placed, pool.map(thumbnails.of_uri, placed.values()), strict=True)
    return webp
