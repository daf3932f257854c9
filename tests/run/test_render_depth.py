"""Point clouds by a job: a vector each, of its six views; labels by the weighted views; bad clouds are rejects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import clipray
from clipray import tables
from clipray.analysis.depth_maps import EMPTY, depth_maps, painted, view_weights
from clipray.demo.solids import write_solids
from clipray.job import Foveal, Model
from clipray.models.image_encoder import ImageEncoder
from clipray.models.resolve import resolve
from clipray.pipelines.cloud_reader import read_cloud
from clipray.pipelines.point_cloud import boxes_of_masks


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_here: object) -> Path:
    home = tmp_path_factory.mktemp("clouds")
    rows = pq.read_table(write_solids(home / "solids", count=32)).to_pylist()
    good = [{**row, "uri": str(home / "solids" / row["uri"])} for row in rows]
    points = np.random.default_rng(0).normal(size=(20, 3))
    bad = {
        "nan": np.where(np.arange(60).reshape(20, 3) == 31, np.nan, points),
        "few": points[:5],
        "flat": points[:, :2],
    }
    for name, values in bad.items():
        np.save(home / f"{name}.npy", values)
    odd = [{"cloud_id": name, "uri": f"{name}.npy", "label": None} for name in bad]
    odd.append({"cloud_id": "gone", "uri": "/no/such/cloud.ply", "label": None})
    pq.write_table(pa.Table.from_pylist([*good, *odd]), home / "m.parquet")
    steps = [
        {
            "render_depth": {
                "manifest": str(home / "m.parquet"),
                "keep": ["label"],
                "max_reject_rate": 0.5,
                "batch_size": 24,
            }
        },
        {"label": {"input": "clouds.clip", "classes": str(home / "solids/classes.yaml")}},
        {"evaluate_labels": {"labels": "labels", "truth": "clouds.label", "bootstrap": 100}},
    ]
    values = {"output": str(home / "out"), "model": {"name": "demo", "precision": "fp32"}, "steps": steps}
    (home / "job.yaml").write_text(yaml.safe_dump(values))
    (report, *_) = clipray.run(str(home / "job.yaml"))
    assert (report.rows, report.rejected) == (32, 4)
    return home


def test_vectors_are_weighted_sums_of_the_views(finished: Path) -> None:
    made = {row["cloud_id"]: row for row in tables.read_table(f"{finished}/out/clouds").to_pylist()}
    encoder = ImageEncoder(resolve(Model(name="demo")), foveal=Foveal(alpha=2), precision="fp32", batch_size=8)
    white, light, gray = (np.full(3, value) for value in (255, 176, 128))
    for row in pq.read_table(finished / "m.parquet").to_pylist()[:10]:
        points = read_cloud(Path(row["uri"]).read_bytes(), 8_192)
        maps = depth_maps(points, 64)
        boxes = boxes_of_masks(torch.from_numpy(maps != EMPTY)).numpy()
        views = encoder.encode(painted(maps, white, light, gray), list(boxes[:, None])).boxes
        summed = (views * view_weights(maps, "area")[:, None]).sum(axis=0)  # type: ignore[operator]
        found = made[row["cloud_id"]]
        assert np.abs(np.array(found["clip"]) - summed / np.linalg.norm(summed)).max() <= 1e-5
        assert (found["points"], found["label"]) == (len(points), row["label"])


def test_bad_clouds_are_rejects(finished: Path) -> None:
    rejects = tables.read_table(f"{finished}/out/rejects/clouds").to_pylist()
    assert {row["cloud_id"]: (row["stage"], row["reason"]) for row in rejects} == {
        "nan": ("decode", "not_finite"),
        "few": ("decode", "too_few_points"),
        "flat": ("decode", "not_a_point_cloud"),
        "gone": ("fetch", "not_found"),
    }


def test_clouds_are_labelled_as_what_they_are(finished: Path) -> None:
    labels = tables.read_table(f"{finished}/out/labels").to_pylist()
    truth = {row["cloud_id"]: row["label"] for row in pq.read_table(finished / "m.parquet").to_pylist()}
    right = np.mean([row["label"] == truth[row["cloud_id"]] for row in labels])
    figures = tables.read_table(f"{finished}/out/metrics").to_pylist()
    assert [row["value"] for row in figures if row["metric"] == "top1"] == [pytest.approx(right)]
    assert right > 0.7
    assert all(report.note == "was finished already" for report in clipray.run(str(finished / "job.yaml")))
