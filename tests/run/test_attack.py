"""Typographic attacks by a job: labels as open_clip gives them for the very pictures that were written on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from run.test_embed_texts import write_manifest

import clipray
from clipray import tables
from clipray.demo.prompts import class_labels
from clipray.demo.world import DemoWorld, write_world
from clipray.errors import ClipRayError, ManifestError
from clipray.job import Lettering, Model
from clipray.models.resolve import resolve
from clipray.pipelines.attack import place_of, write_word, wrong_label

LABELS = list(class_labels())
LARGE = {"size": 0.25}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> DemoWorld:
    return write_world(tmp_path_factory.mktemp("world"), n_scenes=48, n_groups=0, n_words=0, n_places=0, side_px=96)


def job(home: Path, manifest: Path, **settings: Any) -> str:
    given = {"manifest": str(manifest), "classes": LABELS, "lettering": LARGE, "batch_size": 16, **settings}
    values = {"output": str(home / "out"), "model": {"name": "demo", "precision": "fp32"}, "steps": [{"attack": given}]}
    (home / "job.yaml").write_text(yaml.safe_dump(values))
    return str(home / "job.yaml")


def read(home: Path) -> dict[str, dict[str, Any]]:
    return {row["image_id"]: row for row in tables.read_table(str(home / "out/attacks")).to_pylist()}


def upstream(images: list[Image.Image]) -> tuple[list[str], np.ndarray]:
    """Zero-shot labels of pictures and their probabilities, by open_clip alone."""
    model = resolve(Model(name="demo"))
    open_clip.add_model_config(model.config)
    network, _, preprocess = open_clip.create_model_and_transforms("demo", pretrained=model.pretrained)
    network.eval()
    with torch.inference_mode():
        texts = open_clip.get_tokenizer("demo")([f"a photo of a {label}" for label in LABELS])
        classes = network.encode_text(texts, normalize=True)
        vectors = network.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
        p = (network.logit_scale.exp() * vectors @ classes.T).softmax(dim=1)
    return [LABELS[n] for n in p.argmax(dim=1).tolist()], p.max(dim=1).values.numpy()


@pytest.fixture(scope="module")
def finished(world: DemoWorld, tmp_path_factory: pytest.TempPathFactory, ray_here: object) -> Path:
    home = tmp_path_factory.mktemp("finished")
    reports = clipray.run(job(home, world.labelled, rows_per_block=10))
    assert [(r.name, r.rows, r.rejected) for r in reports] == [("attacks", 48, 0), ("attacks_classes", 64, 0)]
    return home


def test_labels_are_those_of_the_written_pictures(finished: Path, world: DemoWorld) -> None:
    found = read(finished)
    rows = pq.read_table(world.labelled).to_pylist()
    clean, written = [], []
    for row in rows:
        made, lettering = found[row["image_id"]], Lettering(**LARGE)  # type: ignore[arg-type]
        assert made["label"] == row["label"] != made["word"]
        assert made["word"] == LABELS[wrong_label(row["image_id"], LABELS.index(row["label"]), 64, 0)]
        image = Image.open(world.folder / row["uri"]).convert("RGB")
        clean.append(image)
        written.append(write_word(image, made["word"], place_of(row["image_id"], lettering, 0), lettering))
    for name, images in (("before", clean), ("after", written)):
        labels, p = upstream(images)
        assert [found[row["image_id"]][name] for row in rows] == labels
        given = np.array([found[row["image_id"]][f"{name}_probability"] for row in rows])
        assert np.abs(given - p).max() <= 1e-5


def test_rates_are_those_of_the_rows(finished: Path) -> None:
    rows = list(read(finished).values())
    metrics = {row["metric"]: row["value"] for row in tables.read_table(f"{finished}/out/metrics").to_pylist()}
    flipped = [row for row in rows if row["after"] != row["before"]]
    to_word = [row for row in flipped if row["after"] == row["word"]]
    assert metrics == pytest.approx(
        {
            "flip_rate": len(flipped) / 48,
            "flip_rate_to_word": len(to_word) / 48,
            "flip_rate_elsewhere": (len(flipped) - len(to_word)) / 48,
            "accuracy_before": sum(row["before"] == row["label"] for row in rows) / 48,
            "accuracy_after": sum(row["after"] == row["label"] for row in rows) / 48,
        }
    )
    assert metrics["accuracy_before"] > 0.9
    assert 0.2 < metrics["flip_rate"] < 1  # letters of a quarter of the picture do something
    assert [report.note for report in clipray.run(str(finished / "job.yaml"))] == ["was finished already"] * 2


@pytest.mark.usefixtures("ray_here")
def test_own_words_new_rows_and_rows_without_a_label(world: DemoWorld, tmp_path: Path) -> None:
    rows = pq.read_table(world.labelled).to_pylist()[:12]
    for row in rows:
        row["uri"] = str(world.folder / row["uri"])
    rows[3]["label"] = None
    rows[4]["uri"] = "/no/such/picture.jpg"
    manifest = write_manifest(tmp_path / "m.parquet", rows[:8])
    path = job(tmp_path, manifest, word="own", max_reject_rate=0.5)
    (report, _) = clipray.run(path)
    assert (report.rows, report.rejected) == (6, 2)
    first = read(tmp_path)
    assert all(row["word"] == row["label"] for row in first.values())
    refused = tables.read_table(f"{tmp_path}/out/rejects/attacks").to_pylist()
    assert {row["image_id"]: row["reason"] for row in refused} == {
        rows[3]["image_id"]: "no_label",
        rows[4]["image_id"]: "not_found",
    }
    write_manifest(manifest, rows)
    (report, _) = clipray.run(path)
    assert (report.rows, report.rejected) == (10, 2)
    assert {key: row for key, row in read(tmp_path).items() if key in first} == first


def test_what_cannot_be_attacked(world: DemoWorld, tmp_path: Path) -> None:
    with pytest.raises(
        ManifestError, match=r"labels that are no classes: .* and 59 more; 2 classes are known"
    ) as caught:
        clipray.plan(job(tmp_path, write_world_labels(tmp_path), classes=["a", "b"]))
    assert "\n" not in str(caught.value)
    with pytest.raises(ManifestError, match=r"no column `label`; found: image_id, uri"):
        clipray.plan(job(tmp_path, write_manifest(tmp_path / "m.parquet", [{"image_id": "a", "uri": "b"}])))
    with pytest.raises(ClipRayError, match=r"classes: 1 of them; expected two or more"):
        clipray.plan(job(tmp_path, world.labelled, classes=["a"]))
    with pytest.raises(
        ClipRayError, match=r"colour: expected a colour: a name such as white, or #rrggbb, found 'grue'"
    ):
        clipray.plan(job(tmp_path, world.labelled, lettering={"colour": "grue"}))


def write_world_labels(home: Path) -> Path:
    """A manifest with each of the 64 labels once; its pictures are never read."""
    rows = [{"image_id": label, "uri": "nowhere.jpg", "label": label} for label in LABELS]
    return write_manifest(home / "labels.parquet", rows)
