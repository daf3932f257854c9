"""A finished run whose tables hold what a stranger may have put there: markup, other directions, control characters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from clipray import tables
from clipray.inputs.index_reader import hash_of
from clipray.storage.folder import Folder
from clipray.tables.shards import rejects_of

MARKUP = '<img src=x onerror="alert(1)"><script>alert(1)</script>'
TURNED, CONTROL = "\u202egnp.exe", "\x1b[31mred\x1b[0m"
HOSTILE = f"{MARKUP}{TURNED}{CONTROL}"
ROWS, WIDTH = 30, 8
STAMP = {"fingerprint": "0123456789abcdef"}
IDS = [
    ("../../etc/{}/passwd", '<b>"{}\'</b>&amp;?#%zz', "\u202eevil\u202c {}\x07", "folder/{}.png", "w" * 300 + "{}")[n % 5].format(n)
    for n in range(ROWS)
]  # fmt: skip
NAMES = pa.field("image_id", pa.string(), False)


def finish(folder: Folder, table: str, data: pa.Table, **facts: Any) -> None:
    shard = tables.write_shard(folder, "part-000000.parquet", table, data, STAMP)
    known = {"inputs": {"rows": ROWS, "digest": "00"}, "settings": {"step": table}, "provenance": STAMP, **facts}
    tables.commit(folder, table, data.schema, [shard], fingerprint=STAMP["fingerprint"], **known)


def write_rows(folder: Folder, table: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """A table of rows that are named by `image_id`."""
    schema = pa.schema([NAMES, *tables.arrow_schema(table)])
    finish(folder, table, pa.Table.from_pylist(rows, schema=schema), **facts)


def unit_vectors() -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def write_images(output: Folder, home: Path) -> None:
    """Of the last image the file is gone. Two rows were rejected: one of 500 other bytes, one without a file."""
    Image.new("RGB", (48, 32), "red").save(home / "red.png")
    (home / "bad.jpg").write_bytes(b"<script>alert(1)</script>" * 20)
    schema = tables.arrow_schema("images", {"clip": WIDTH}, extra=[pa.field(n, pa.string()) for n in ("label", "evil")])
    columns = {
        "image_id": IDS,
        "uri": [str(home / ("red.png" if n < ROWS - 1 else "gone.png")) for n in range(ROWS)],
        "height": pa.array([32] * ROWS, pa.int32()),
        "width": pa.array([48] * ROWS, pa.int32()),
        "clip": tables.vector_array(unit_vectors(), schema.field("clip").type),
        "label": [f"{MARKUP}{n % 2}" for n in range(ROWS)],
        "evil": [f"{HOSTILE}{n % 3}" for n in range(ROWS)],
    }
    facts = {"rejects": 2, "rejects_by_reason": {"not_an_image": 1, "not_found": 1}}
    finish(output.sub("images"), "images", pa.table(columns, schema=schema), **facts)
    rejected = [
        {"image_id": f"rejected/{MARKUP}", "uri": str(home / "bad.jpg"), "stage": "decode", "reason": "not_an_image", "message": HOSTILE},
        {"image_id": None, "uri": None, "stage": "fetch", "reason": "not_found", "message": HOSTILE},
    ]  # fmt: skip
    named = [pa.field("image_id", pa.string()), pa.field("uri", pa.string())]
    data = pa.Table.from_pylist(rejected, schema=pa.schema([*named, *tables.arrow_schema("rejects")]))
    finish(rejects_of(output, "images"), "rejects", data)


def write_index(folder: Folder) -> None:
    index = faiss.IndexFlatIP(WIDTH)
    index.add(unit_vectors())
    file = "index-00112233.faiss"
    folder.write(file, faiss.serialize_index(index).tobytes())
    rows = pa.table([pa.array(range(ROWS)), pa.array(IDS)], schema=pa.schema([*tables.arrow_schema("index"), NAMES]))
    files = {"index_file": file, "lists_file": None, "sizes": {file: folder.sizes()[file]}}
    facts = {**STAMP, **files, "sha256": {file: hash_of(folder, file)}, "metric": "cosine", "space": {}, "width": WIDTH}
    finish(folder, "index", rows, provenance={**facts, "input": {"name": "images.clip"}}, summary={"type": "Flat"},
           inputs={"rows": ROWS, "digest": "00", "input": "images.clip"})  # fmt: skip


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images with rejects, clusters, labels, duplicates, a map and an index, all of the same rows."""
    home = tmp_path_factory.mktemp("hostile")
    output = Folder(str(home / "<i>run"))
    write_images(output, home)
    write_index(output.sub("index"))
    numbered = list(enumerate(IDS))
    write_rows(
        output.sub("clusters"),
        "clusters",
        [{"image_id": i, "cluster_id": n % 2, "distance": n / 10} for n, i in numbered],
    )
    group = {"group_id": 0, "cluster_id": 1, "keeper_id": IDS[0], "similarity": 1.0, "nearest": 1.0}
    write_rows(
        output.sub("duplicates"), "duplicates", [{"image_id": i, "kept": n == 0, **group} for n, i in numbered[:3]]
    )
    styled = {"style": HOSTILE, "probability": 0.9, "margin": 0.5}
    top = [[{"label": f"{MARKUP}{k}", "probability": 0.9 - 0.8 * k} for k in range(2)]]
    rows = [
        {"image_id": i, "label": f"{MARKUP}{n // 2 % 2}" if n else None, "top": top[0], **styled} for n, i in numbered
    ]
    write_rows(output.sub("labels"), "labels", rows, summary={"styles": {HOSTILE: 2}})
    places = [{"image_id": i, "x": float(n % 6), "y": float(n // 6), "neighbors": None} for n, i in numbered]
    write_rows(output.sub("map"), "map", places)
    return output.url
