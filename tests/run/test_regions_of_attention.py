"""Boxes by a job: encoded, labelled, referred to; a bad row is a reject, a changed one is made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

import clipray
from clipray import tables
from clipray.demo.world import DemoWorld, write_world
from clipray.errors import JobError, ManifestError, ModelError, SchemaError
from clipray.job import Foveal, Model
from clipray.models.geometry import boxes_to_cells, geometry
from clipray.models.image_encoder import ImageEncoder
from clipray.models.preprocess import preprocess_of
from clipray.models.resolve import resolve
from clipray.storage.folder import Folder

BOX = [0.0, 0.0, 40.0, 40.0]
# Rows that are not as they should be: boxes, captions, ids of boxes.
ODD: dict[str, tuple[Any, Any, Any]] = {
    "good": ([BOX, [10.0, 10.0, 200.0, 50.0]], ["a", None], ["x", "y"]),
    "outside": ([BOX, [100.0, 0.0, 120.0, 20.0]], ["a", "b"], None),
    "no area": ([[20.0, 20.0, 20.0, 40.0]], None, None),
    "nothing": (None, None, None),
    "many": ([BOX] * 6, None, None),
    "captions": ([], ["a"], None),
    "uneven": ([BOX, BOX], ["a"], None),
    "wide": ([BOX, [80.0, 10.0, 120.0, 60.0]], ["a", "b"], None),
    "gone": ([BOX], None, None),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> DemoWorld:
    made = write_world(tmp_path_factory.mktemp("world"), n_scenes=1, n_groups=40, n_words=0, n_places=0, side_px=96)
    with Image.open(made.folder / "pictures/single-00000.jpg") as image:
        image.resize((192, 96)).save(made.folder / "wide.png")  # of which the network sees the middle
    return made


def manifest_of(path: Path, world: DemoWorld, groups: list[dict[str, Any]]) -> Path:
    """Groups of the world and the odd rows."""
    picture = str(world.folder / "pictures/single-00000.jpg")
    uris = {"wide": str(world.folder / "wide.png"), "gone": "/no/such/picture.jpg"}
    rows = [{**row, "uri": str(world.folder / row["uri"])} for row in groups]
    rows += [
        {"image_id": key, "uri": uris.get(key, picture), "boxes": b, "box_captions": c, "box_ids": i}
        for key, (b, c, i) in ODD.items()
    ]
    strings = pa.list_(pa.string())
    schema = pa.schema(
        {"image_id": pa.string(), "uri": pa.string(), "boxes": pa.list_(pa.list_(pa.float32())), "box_captions": strings,
         "box_ids": strings, "box_labels": strings}
    )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return path


def job(home: Path, steps: list[dict[str, Any]], model: str = "demo") -> str:
    values = {"output": str(home / "out"), "model": {"name": model, "precision": "fp32"}, "steps": steps}
    (home / "job.yaml").write_text(yaml.safe_dump(values))
    return str(home / "job.yaml")


def steps_for(manifest: Path, world: DemoWorld, **foveal: Any) -> list[dict[str, Any]]:
    embed = {
        "manifest": str(manifest),
        "batch_size": 16,
        "rows_per_block": 10,
        "max_regions": 5,
        "max_reject_rate": 0.9,
    }
    return [
        {"embed_regions": {**embed, **({"foveal": foveal} if foveal else {})}},
        {"refer": {"input": "regions.clip"}},
        {"label": {"input": "regions.clip", "classes": str(world.classes_yaml)}},
        {"evaluate_labels": {"labels": "labels", "truth": "regions.label", "bootstrap": 100}},
        {"refer": {"name": "less_dataset", "input": "regions.clip", "subtract": "dataset", "dataset_captions": 50}},
    ]


def rows_of(home: Path, name: str, key: str) -> dict[str, dict[str, Any]]:
    return {row[key]: row for row in tables.read_table(str(home / "out" / name)).to_pylist()}


def figures(home: Path, step: str) -> dict[str, float]:
    rows = tables.read_table(f"{home}/out/metrics").to_pylist()
    return {row["metric"]: row["value"] for row in rows if row["step"] == step}


@pytest.fixture(scope="module")
def finished(world: DemoWorld, tmp_path_factory: pytest.TempPathFactory, ray_here: object) -> Path:
    home = tmp_path_factory.mktemp("finished")
    groups = pq.read_table(world.groups).to_pylist()[:36]
    clipray.run(job(home, steps_for(manifest_of(home / "m.parquet", world, groups), world)))
    return home


def test_vectors_are_those_of_the_steered_network(finished: Path, world: DemoWorld) -> None:
    model, made = resolve(Model(name="demo")), rows_of(finished, "regions", "region_id")
    rows, to_pixels = pq.read_table(world.groups).to_pylist()[:36], preprocess_of(model)
    images = [Image.open(world.folder / row["uri"]).convert("RGB") for row in rows]
    boxes = [boxes_to_cells(geometry(96, 96, model.preprocess), np.array(row["boxes"]), 64, 64) for row in rows]
    encoder = ImageEncoder(model, foveal=Foveal(), precision="fp32", batch_size=7)
    expected = encoder.encode(np.stack([to_pixels(image) for image in images]), boxes).boxes
    ids = [f"{row['image_id']}#b{n}" for row in rows for n in range(len(row["boxes"]))]
    assert np.abs(np.array([made[i]["clip"] for i in ids]) - expected).max() <= 1e-5
    for row in rows:
        for n, (caption, label) in enumerate(zip(row["box_captions"], row["box_labels"], strict=True)):
            region = made[f"{row['image_id']}#b{n}"]
            assert (region["caption"], region["label"], region["image_id"]) == (caption, label, row["image_id"])
            assert np.allclose(region["box_xyxy"], row["boxes"][n])


def test_bad_boxes_and_bad_rows_are_rejects(finished: Path) -> None:
    pictures, boxes = (rows_of(finished, f"rejects/{name}", "image_id") for name in ("regions_pictures", "regions"))
    assert {key: row["reason"] for key, row in pictures.items()} == {
        "many": "too_many_boxes",
        "captions": "no_boxes",
        "uneven": "unequal_lists",
        "gone": "not_found",
    }
    assert pictures["many"]["message"] == "6 boxes, more than max_regions=5"
    assert pictures["uneven"]["message"] == "`box_captions` has 1 entries for 2 boxes; expected one each"
    assert {key: row["reason"] for key, row in boxes.items()} == {
        "outside": "empty_box",
        "no area": "empty_box",
        "wide": "outside_crop",
    }
    assert "outside the image of 96 x 96 px" in boxes["outside"]["message"]
    assert boxes["outside"]["image_id"] == "outside"
    rows = rows_of(finished, "regions", "region_id")
    odd = {key: row for key, row in rows.items() if row["image_id"] in ODD}
    assert odd.keys() == {"good#b0", "good#b1", "outside#b0", "wide#b1"}
    assert [(odd[f"good#b{n}"]["box_id"], odd[f"good#b{n}"]["caption"]) for n in (0, 1)] == [("x", "a"), ("y", None)]
    assert odd["good#b1"]["clipped"]
    assert odd["good#b1"]["box_xyxy"] == [10, 10, 96, 50]
    counts = {key: row["region_count"] for key, row in rows_of(finished, "regions_pictures", "image_id").items()}
    assert {key: counts[key] for key in ODD if key in counts} == {
        "good": 2, "outside": 1, "no area": 0, "nothing": 0, "wide": 1,
    }  # fmt: skip


def test_captions_find_their_boxes(finished: Path) -> None:
    """Against scores by open_clip's text tower and plain loops."""
    regions = rows_of(finished, "regions", "region_id")
    network, tokenizer = _upstream()
    found = tables.read_table(f"{finished}/out/referred").to_pylist()
    assert sorted(row["truth"] for row in found) == sorted(key for key, r in regions.items() if r["caption"])
    for row in found:
        boxes = [r for r in regions.values() if r["image_id"] == row["image_id"]]
        said = [r["caption"] for r in boxes if r["caption"]]
        with torch.inference_mode():
            texts = network.encode_text(tokenizer(said), normalize=True).numpy()
        cosine = np.array([r["clip"] for r in boxes]) @ texts.T
        here = [r["region_id"] for r in boxes if r["caption"]].index(row["truth"])
        others = [m for m in range(len(said)) if m != here]
        score = cosine[:, here] - (cosine[:, others].mean(axis=1) if others else 0)
        assert row["region_id"] == boxes[int(score.argmax())]["region_id"]
        assert (row["score"], row["similarity"]) == pytest.approx((score.max(), cosine[score.argmax(), here]), abs=1e-5)
        assert row["boxes"] == len(boxes)
        assert (row["margin"] is None) == (len(boxes) == 1)
        own = [r["region_id"] for r in boxes].index(row["truth"])
        assert row["rank"] == 1 + (score > score[own]).sum()
        assert row["correct"] == (row["region_id"] == row["truth"])
    several = [row for row in found if row["boxes"] > 1]
    assert figures(finished, "referred") == pytest.approx(
        {
            "accuracy": np.mean([row["correct"] for row in found]),
            "accuracy_of_several": np.mean([row["correct"] for row in several]),
            "chance_of_several": np.mean([1 / row["boxes"] for row in several]),
        }
    )
    assert figures(finished, "referred")["accuracy_of_several"] > 0.9


def test_captions_of_the_whole_data_set_are_subtracted(finished: Path) -> None:
    """Against means of all captions, of which fifty are drawn: each box's differs from it by what the sample does."""
    regions = rows_of(finished, "regions", "region_id")
    network, tokenizer = _upstream()
    every = [row["caption"] for row in regions.values() if row["caption"]]
    with torch.inference_mode():
        texts = network.encode_text(tokenizer(every), normalize=True).numpy()
    found = tables.read_table(f"{finished}/out/less_dataset").to_pylist()
    assert len(found) == len(every) > 60
    baselines: dict[str, list[float]] = {}
    for row in found:
        baselines.setdefault(row["region_id"], []).append(row["similarity"] - row["score"])
    assert all(np.ptp(values) <= 1e-5 for values in baselines.values())  # whatever the caption
    boxes = np.array([regions[key]["clip"] for key in baselines])
    of_all, drawn = boxes @ texts.mean(axis=0), np.array([values[0] for values in baselines.values()])
    assert np.corrcoef(of_all, drawn)[0, 1] > 0.9
    assert np.abs(of_all - drawn).max() < 0.1
    record = tables.read_record(Folder(f"{finished}/out/less_dataset"))
    assert record is not None
    assert record.summary["captions_drawn"] == 50


def _upstream() -> tuple[Any, Any]:
    model = resolve(Model(name="demo"))
    open_clip.add_model_config(model.config)
    return open_clip.create_model("demo", pretrained=model.pretrained).eval(), open_clip.get_tokenizer("demo")


def test_boxes_are_labelled(finished: Path) -> None:
    regions, labels = rows_of(finished, "regions", "region_id"), rows_of(finished, "labels", "region_id")
    assert labels.keys() == regions.keys()
    right = [labels[key]["label"] == row["label"] for key, row in regions.items() if row["label"]]
    assert figures(finished, "label_figures")["top1"] == pytest.approx(np.mean(right))
    assert np.mean(right) > 0.4  # of 64 classes


@pytest.mark.usefixtures("ray_here")
def test_goes_on_and_notices_changes(finished: Path, world: DemoWorld) -> None:
    assert all(report.note == "was finished already" for report in clipray.run(str(finished / "job.yaml")))
    before = rows_of(finished, "regions", "region_id")
    groups = pq.read_table(world.groups).to_pylist()
    groups[1]["boxes"] = groups[1]["boxes"][::-1]
    manifest = manifest_of(finished / "m.parquet", world, groups)
    own, pictures, *_ = clipray.run(job(finished, steps_for(manifest, world)[:2]))
    after = rows_of(finished, "regions", "region_id")
    assert (own.rows, pictures.rows) == (len(after), 40 + 5)
    assert len(after) == 4 + sum(len(row["boxes"]) for row in groups)
    same = [key for key in before if before[key]["image_id"] != groups[1]["image_id"]]
    assert all(after[key] == before[key] for key in same)
    assert after[f"{groups[1]['image_id']}#b0"]["box_xyxy"] == groups[1]["boxes"][0]
    assert len(tables.read_table(f"{finished}/out/referred")) == sum(bool(row["caption"]) for row in after.values())
    report = clipray.plan(job(finished, steps_for(manifest, world, alpha=3)))[0][0]
    assert report.note == "stale: foveal.alpha was 8.0, is 3.0"


def test_what_cannot_be_asked(world: DemoWorld, tmp_path: Path) -> None:
    step = {"manifest": str(world.groups)}
    with pytest.raises(JobError, match=r"`foveal` goes with `prompt: foveal`, found `prompt: crop`"):
        clipray.plan(job(tmp_path, [{"embed_regions": {**step, "prompt": "crop", "foveal": {"alpha": 1}}}]))
    with pytest.raises(ModelError, match=r"prompt: foveal: it is a ResNet: there is no class token"):
        clipray.plan(job(tmp_path, [{"embed_regions": step}], model="demo-rn"))
    with pytest.raises(ModelError, match=r"foveal: blocks: this ViT has 4 blocks, numbered from 0; found \[7\]"):
        clipray.plan(job(tmp_path, [{"embed_regions": {**step, "foveal": {"blocks": [7]}}}]))
    with pytest.raises(
        ModelError, match=r"falip: its blocks are 8 to 11 of 12, this ViT has 4; set `blocks`, such as `blocks: 1`"
    ):
        clipray.plan(job(tmp_path, [{"embed_regions": {**step, "foveal": {"mask": "falip"}}}]))
    with pytest.raises(JobError, match=r"`random_state` goes with `subtract: dataset`, found `subtract: others`"):
        clipray.plan(job(tmp_path, [{"refer": {"input": "regions.clip", "random_state": 1}}]))
    with pytest.raises(ManifestError, match=r"`embed_regions` needs a column `boxes`; found: image_id, uri, label"):
        clipray.plan(job(tmp_path, [{"embed_regions": {"manifest": str(world.labelled)}}]))
    with pytest.raises(JobError, match=r"refer.template: expected a text with `{}` where the caption goes, found 'a'"):
        clipray.plan(job(tmp_path, [{"refer": {"input": "regions.clip", "template": "a"}}]))


def test_regions_without_captions_cannot_be_referred_to(finished: Path, tmp_path: Path) -> None:
    source = {"path": f"{finished}/out/labels_classes/*.parquet", "column": "vector", "id": "label"}
    with pytest.raises(SchemaError, match=r"no column `image_id`; expected regions with captions: `embed_regions`"):
        clipray.plan(job(tmp_path, [{"refer": {"input": source}}]))
