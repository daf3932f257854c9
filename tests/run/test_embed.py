"""The main job in one process, on the session's Ray: right vectors, nothing lost, nothing doubled, changes noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import draw_pictures, write_job

import clipray
from clipray import status, tables
from clipray.errors import RejectRateError, StaleTableError
from clipray.inputs.committed_rows import REFUSED
from clipray.inputs.make_manifest import make_manifest

pytestmark = pytest.mark.usefixtures("ray_here")


def vectors(url: str | Path, column: str = "clip") -> dict[str, np.ndarray]:
    table = tables.read_table(str(url), ["image_id", column])
    matrix = np.stack(table[column].to_numpy())
    return dict(zip(table["image_id"].to_pylist(), matrix, strict=True))


def reasons(url: str | Path) -> dict[str | None, str]:
    table = tables.read_table(str(url), ["image_id", "reason"])
    return dict(zip(table["image_id"].to_pylist(), table["reason"].to_pylist(), strict=True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pictures: Path, tiny_model: str, ray_here: object) -> Path:
    """An uninterrupted run over all pictures, with labels kept."""
    home = tmp_path_factory.mktemp("finished")
    make_manifest(str(pictures), str(home / "m.parquet"), label="folder")
    clipray.run(write_job(home / "job.yaml", home / "m.parquet", tiny_model, keep=["label"], batch_size=16))
    return home


def test_vectors_are_open_clips_own(finished: Path, pictures: Path, tiny_model: str) -> None:
    import open_clip
    import torch
    from PIL import Image

    network, _, preprocess = open_clip.create_model_and_transforms(tiny_model)
    network.eval()
    found = vectors(finished / "out" / "images")
    assert len(found) == 300
    for image_id in sorted(found)[::29]:
        with torch.inference_mode():
            expected = network.encode_image(preprocess(Image.open(pictures / image_id))[None], normalize=True)[
                0
            ].numpy()
        assert np.abs(found[image_id] - expected).max() <= 1e-5


def test_table_says_what_it_is(finished: Path, pictures: Path, tiny_model: str) -> None:
    record = json.loads((finished / "out" / "images" / "_table.json").read_text())
    assert (record["rows"], record["rejects"]) == (300, 0)
    assert record["workers"][0]["precision"] == "fp32"
    assert record["workers"][0]["self_check_cosine"] == 1.0
    shard = pq.ParquetFile(finished / "out" / "images" / record["files"][0]["name"])
    stamp = json.loads(shard.schema_arrow.metadata[b"clipray"])
    assert stamp["fingerprint"] == record["fingerprint"]
    assert stamp["model"]["weights"].startswith("sha256:")
    assert stamp["model"]["precision"] == "fp32"
    table = tables.read_table(str(finished / "out" / "images"))
    assert table.schema.field("clip").type == tables.vector_type(32)
    assert set(table["label"].to_pylist()) == {"class0", "class1", "class2"}
    row = table.filter(pa.compute.equal(table["image_id"], "class0/00000.jpg")).to_pylist()[0]
    from PIL import Image

    with Image.open(pictures / "class0" / "00000.jpg") as image:
        assert (row["height"], row["width"]) == (image.height, image.width)


def test_finished_run_does_nothing(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished / "out" / "images").iterdir()}
    (report,) = clipray.run(finished / "job.yaml")
    assert report.note == "was finished already"
    assert {p: p.stat().st_mtime_ns for p in (finished / "out" / "images").iterdir()} == before


@pytest.mark.parametrize(
    "settings",
    [{"decode_in": "tasks", "rows_per_block": 7, "rows_per_file": 20}, {"decode_in": "actors", "actors": 2}],
)
def test_same_vectors_however_it_is_laid_out(
    settings: dict[str, Any], finished: Path, tiny_model: str, tmp_path: Path
) -> None:
    clipray.run(write_job(tmp_path / "job.yaml", finished / "m.parquet", tiny_model, batch_size=16, **settings))
    expected, found = vectors(finished / "out" / "images"), vectors(tmp_path / "out" / "images")
    assert found.keys() == expected.keys()
    assert max(np.abs(found[k] - expected[k]).max() for k in expected) <= 1e-6
    if "rows_per_file" in settings:
        rows = [f["rows"] for f in json.loads((tmp_path / "out" / "images" / "_table.json").read_text())["files"]]
        assert len(rows) > 5
        assert max(rows) < 20 + 7


def test_decoding_tasks_are_not_fused_into_the_encoder(tiny_model: str, finished: Path, tmp_path: Path) -> None:
    from clipray.engine.cluster import ClusterResources, Node
    from clipray.engine.plan import make_plan
    from clipray.engine.progress import Progress
    from clipray.engine.stream import _dataset
    from clipray.engine.workers import ReadPlan
    from clipray.inputs.key_index import KeyIndex
    from clipray.inputs.manifest import open_manifest
    from clipray.inputs.row_index import scan
    from clipray.job import EmbedImages, Feature, Model
    from clipray.models.resolve import resolve
    from clipray.pipelines.spec import ImageSpec, Limits

    manifest = open_manifest(str(finished / "m.parquet"))
    counted = scan(manifest)
    settings = EmbedImages(manifest="m", decode_in="tasks")
    encode = ImageSpec(
        model=resolve(Model(name=tiny_model)),
        limits=Limits(),
        features={"clip": Feature()},
        schema=tables.arrow_schema("images", {"clip": 32}),
        batch_size=16,
    )
    work = ReadPlan(manifest.row_groups, manifest.columns(), KeyIndex(counted.keys[:40], counted.index.seed), {}, 8)
    data = _dataset(work, make_plan(settings, ClusterResources((Node(4),))), encode, Progress().reporter).materialize()
    assert data.count() == 40
    operators = [line for line in data.stats().splitlines() if line.startswith("Operator")]
    encoders = [line for line in operators if "(Encode)" in line]
    assert len(encoders) == 1
    assert "->" not in encoders[0]


def test_new_rows_are_added_and_gone_ones_removed(pictures: Path, tiny_model: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    draw_pictures(mine, 40)
    job = write_job(tmp_path / "job.yaml", tmp_path / "m.parquet", tiny_model, batch_size=16)
    make_manifest(mine, tmp_path / "m.parquet")
    clipray.run(job)
    first = vectors(tmp_path / "out" / "images")
    draw_pictures(mine, 8, start=40)
    for gone in sorted(mine.rglob("*.jpg"))[:5]:
        gone.unlink()
    make_manifest(str(mine), str(tmp_path / "m.parquet"))
    (planned,), _ = clipray.plan(job)
    assert (planned.state, planned.note) == ("partial", "8 rows to do")
    (report,) = clipray.run(job)
    assert report.rows == 43
    second = vectors(tmp_path / "out" / "images")
    assert set(second) == {str(p.relative_to(mine)) for p in mine.rglob("*.jpg")}
    assert all((second[k] == first[k]).all() for k in second.keys() & first.keys())


def test_changed_settings_are_noticed(tiny_model: str, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "p", 6)
    make_manifest(str(tmp_path / "p"), str(tmp_path / "m.parquet"))
    clipray.run(write_job(tmp_path / "job.yaml", tmp_path / "m.parquet", tiny_model, batch_size=4))
    (planned,), _ = clipray.plan(
        write_job(tmp_path / "job.yaml", tmp_path / "m.parquet", tiny_model, batch_size=8, actors=1)
    )
    assert planned.state == "finished"  # how fast is no part of what
    changed = write_job(tmp_path / "job.yaml", tmp_path / "m.parquet", tiny_model, normalize="none")
    (planned,), _ = clipray.plan(changed)
    assert planned.note == "stale: normalize was 'l2', is 'none'"
    before = vectors(tmp_path / "out" / "images")
    with pytest.raises(StaleTableError, match="normalize was 'l2', is 'none'"):
        clipray.run(changed)
    assert vectors(tmp_path / "out" / "images").keys() == before.keys()
    clipray.run(changed, fresh=["images"])
    raw = vectors(tmp_path / "out" / "images")
    assert all(abs(np.linalg.norm(v) - 1) > 1e-3 for v in raw.values())


def test_bad_rows_become_rejects_and_are_tried_again_on_request(tiny_model: str, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    draw_pictures(folder, 20)
    make_manifest(str(folder), str(tmp_path / "m.parquet"))
    rows = pq.read_table(tmp_path / "m.parquet").to_pylist()
    (folder / "class0" / "00000.jpg").write_bytes(b"")
    (folder / "class1" / "00001.jpg").write_bytes(b"no picture at all")
    rows += [{"image_id": "gone", "uri": "p/gone.jpg"}, {"image_id": None, "uri": "p/class2/00002.jpg"}]
    rows += [{"image_id": "class2/00002.jpg", "uri": "p/class0/00003.jpg"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    job = write_job(tmp_path / "job.yaml", tmp_path / "m.parquet", tiny_model, batch_size=8, max_reject_rate=0.15)
    with pytest.raises(
        RejectRateError, match=r"5 of 23 rows were rejected \(21\.7%\), more than max_reject_rate=0\.15"
    ):
        clipray.run(job)
    assert status(tmp_path / "out")[0].rows == 18  # kept
    job = write_job(tmp_path / "job.yaml", tmp_path / "m.parquet", tiny_model, batch_size=8, max_reject_rate=0.5)
    (report,) = clipray.run(job)
    assert (report.rows, report.rejected, report.total) == (18, 5, 23)
    found = reasons(tmp_path / "out" / "rejects" / "images")
    assert found == {
        "class0/00000.jpg": "empty", "class1/00001.jpg": "not_an_image", "gone": "not_found", None: "null_id", "class2/00002.jpg": "duplicate_id",
    }  # fmt: skip
    assert (tmp_path / "out" / "rejects" / "images" / REFUSED).is_file()
    draw_pictures(folder, 2)
    (report,) = clipray.run(job, retry_rejects=True)
    assert (report.rows, report.rejected) == (20, 3)


def test_inline_bytes_float16_and_a_manifest_of_many_files(pictures: Path, tiny_model: str, tmp_path: Path) -> None:
    files = sorted(pictures.rglob("*.jpg"))[:60]
    (tmp_path / "m").mkdir()
    for number in range(3):
        part = files[number * 20 : number * 20 + 20]
        table = pa.table(
            {
                "bytes": [p.read_bytes() for p in part],
                "image_id": pa.array([p.name for p in part], pa.large_string()),
                "weight": [1.5] * 20,
            }
        )
        pq.write_table(table, tmp_path / "m" / f"{number}.parquet", row_group_size=7)
    clipray.run(
        write_job(
            tmp_path / "job.yaml", tmp_path / "m", tiny_model, vector_type="float16", keep=["weight"], batch_size=16
        )
    )
    table = tables.read_table(str(tmp_path / "out" / "images"))
    assert sorted(table["image_id"].to_pylist()) == sorted(p.name for p in files)
    assert table.schema.field("clip").type == tables.vector_type(32, "float16")
    assert table["uri"].null_count == 60
    assert set(table["weight"].to_pylist()) == {1.5}


def test_real_photos_exact_and_fast(photos: Path, tiny_model: str, tmp_path: Path) -> None:
    make_manifest(str(photos), str(tmp_path / "m.parquet"))
    clipray.run(write_job(tmp_path / "job.yaml", tmp_path / "m.parquet", tiny_model, batch_size=16))
    clipray.run(
        write_job(
            tmp_path / "fast.yaml",
            tmp_path / "m.parquet",
            tiny_model,
            batch_size=16,
            decode="fast",
            output=tmp_path / "fast",
        )
    )
    exact, fast = vectors(tmp_path / "out" / "images"), vectors(tmp_path / "fast" / "images")
    assert len(exact) == len(list(photos.iterdir()))
    cosines = np.array([exact[k] @ fast[k] for k in exact])
    assert cosines.min() > 0.99
    sizes = [
        dict(zip(*(tables.read_table(str(tmp_path / o / "images"))[c].to_pylist() for c in ("image_id", "height"))))
        for o in ("out", "fast")
    ]
    assert sizes[0] == sizes[1]
