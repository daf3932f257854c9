"""A finished run, written by hand: images with kept columns, regions, labels, clusters, duplicates, and two indexes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest

from clipray import tables
from clipray.inputs.index_reader import hash_of
from clipray.storage.folder import Folder

STAMP = {"fingerprint": "0123456789abcdef"}
ROWS, WIDTH = 60, 8
TAGS = pa.list_(pa.field("element", pa.string()))


def finish(folder: Folder, table: str, data: list[pa.Table], **facts: Any) -> None:
    """Write shards and the record of a table."""
    shards = [tables.write_shard(folder, f"part-{n:06d}.parquet", table, part, STAMP) for n, part in enumerate(data)]
    known = {"inputs": {"rows": ROWS, "digest": "00"}, "settings": {"step": table}, "provenance": STAMP, **facts}
    tables.commit(folder, table, data[0].schema, shards, fingerprint=STAMP["fingerprint"], **known)


def unit_vectors(seed: int, rows: int = ROWS) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def write_images(folder: Folder) -> None:
    kept = [pa.field("colour", pa.string()), pa.field("weight", pa.float64()), pa.field("tags", TAGS)]
    kept += [pa.field("label", pa.string()), pa.field("taken", pa.date32())]
    schema = tables.arrow_schema("images", {"clip": WIDTH}, extra=kept)
    columns = {
        "image_id": [f"{n}.jpg" for n in range(ROWS)],
        "uri": [None if n == 7 else f"{n}.jpg" for n in range(ROWS)],
        "height": pa.array([480] * ROWS, pa.int32()),
        "width": pa.array([100 + n for n in range(ROWS)], pa.int32()),
        "clip": tables.vector_array(unit_vectors(0), schema.field("clip").type),
        "colour": ["red", "blue", None] * (ROWS // 3),
        "weight": pa.array([n / 2 if n else float("nan") for n in range(ROWS)]),
        "tags": pa.array([["a"]] * ROWS, TAGS),
        "label": ["cat", "dog"] * (ROWS // 2),
        "taken": pa.array([n * 100 for n in range(ROWS)], pa.int32()).cast(pa.date32()),
    }
    data = pa.table(columns, schema=schema)
    finish(folder, "images", [data[:40], data[40:]], inputs={"rows": ROWS, "manifest": ["/photos/m.parquet"]})


def write_labels(folder: Folder) -> None:
    """Of two styles, in another order than the images; the second style is right about every image."""
    schema = pa.schema([pa.field("image_id", pa.string(), False), *tables.arrow_schema("labels")])
    shards = []
    for style, labels in (("template", ["cat"] * ROWS), ("photo", ["cat", "dog"] * (ROWS // 2))):
        rows = [
            {
                "image_id": f"{n}.jpg",
                "style": style,
                "label": labels[n],
                "probability": n / ROWS,
                "margin": 0.0,
                "top": [],
            }
            for n in reversed(range(ROWS))
        ]
        shards.append(pa.Table.from_pylist(rows, schema=schema))
    finish(folder, "labels", shards, summary={"styles": {"template": 2, "photo": 2}})


def write_clusters(output: Folder) -> None:
    names = pa.field("image_id", pa.string(), False)
    rows = [{"image_id": f"{n}.jpg", "cluster_id": n % 4, "distance": 0.5} for n in range(ROWS)]
    schema = pa.schema([names, *tables.arrow_schema("clusters")])
    finish(output.sub("clusters"), "clusters", [pa.Table.from_pylist(rows, schema=schema)])
    group = {"group_id": 0, "cluster_id": 1, "keeper_id": "1.jpg", "similarity": 1.0, "nearest": 1.0}
    pair = [{"image_id": f"{n}.jpg", "kept": n == 1, **group} for n in (1, 5)]
    schema = pa.schema([names, *tables.arrow_schema("duplicates")])
    finish(output.sub("duplicates"), "duplicates", [pa.Table.from_pylist(pair, schema=schema)])


def write_regions(folder: Folder) -> None:
    """Two regions of each of the first ten images."""
    schema = tables.arrow_schema("regions", {"clip": WIDTH})
    rows = [
        {"image_id": f"{n}.jpg", "region_id": f"{n}.jpg#g{g}", "box_xyxy": [0.0, 1.0, 10.0 + g, 20.0], "scale": g, "clipped": False}
        for n in range(10)
        for g in range(2)
    ]  # fmt: skip
    vectors = tables.vector_array(unit_vectors(1, 20), schema.field("clip").type)
    data = pa.Table.from_pylist(rows, schema=schema.remove(schema.get_field_index("clip")))
    finish(folder, "regions", [data.append_column(schema.field("clip"), vectors).select(schema.names)])


def write_texts(folder: Folder) -> None:
    """Two captions of each of the first five images, the second ones behind the first, and a text of no image."""
    schema = tables.arrow_schema("texts", {"embedding": WIDTH}, extra=[pa.field("image_id", pa.string())])
    images = [f"{n}.jpg" for n in range(5)] * 2 + [None]
    columns = {
        "text_id": [f"t{n}" for n in range(11)],
        "text": [f"{('first', 'second', 'no')[n // 5]} caption {n % 5}" for n in range(11)],
        "truncated": [False] * 11,
        "embedding": tables.vector_array(unit_vectors(4, 11), schema.field("embedding").type),
        "image_id": images,
    }
    data = pa.table(
        [
            pa.array(columns[name], schema.field(name).type) if isinstance(columns[name], list) else columns[name]
            for name in schema.names
        ],
        schema=schema,
    )
    finish(folder, "texts", [data[:7], data[7:]])


def write_index(folder: Folder, source: str, x: np.ndarray, ids: dict[str, list[str]]) -> None:
    index = faiss.IndexFlatIP(WIDTH)
    index.add(x)
    file = "index-00112233.faiss"
    folder.write(file, faiss.serialize_index(index).tobytes())
    fields = [pa.field(name, pa.string(), False) for name in ids]
    rows = pa.table(
        [pa.array(range(len(x))), *map(pa.array, ids.values())],
        schema=pa.schema([*tables.arrow_schema("index"), *fields]),
    )
    files = {"index_file": file, "lists_file": None, "sizes": {file: folder.sizes()[file]}}
    facts = {**STAMP, **files, "sha256": {file: hash_of(folder, file)}, "metric": "cosine", "space": {}, "width": WIDTH}
    finish(folder, "index", [rows], provenance={**facts, "input": {"name": source}}, summary={"type": "Flat"},
           inputs={"rows": len(x), "digest": "00", "input": source})  # fmt: skip


@pytest.fixture(scope="session")
def queried_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its index holds the images in the order of their names, and one row more that no table knows."""
    home = Path(tmp_path_factory.mktemp("queried") / "run")
    output = Folder(str(home))
    write_images(output.sub("images"))
    write_labels(output.sub("labels"))
    write_clusters(output)
    write_regions(output.sub("regions"))
    write_texts(output.sub("texts"))
    names = sorted(range(ROWS), key=lambda n: f"{n}.jpg")
    x = np.concatenate([unit_vectors(0)[names], unit_vectors(2, 1)])
    write_index(output.sub("index"), "images.clip", x, {"image_id": [*(f"{n}.jpg" for n in names), "unknown"]})
    regions = {
        "image_id": [f"{n // 2}.jpg" for n in range(20)],
        "region_id": [f"{n // 2}.jpg#g{n % 2}" for n in range(20)],
    }
    write_index(output.sub("region_index"), "regions.clip", unit_vectors(1, 20), regions)
    return str(home)
