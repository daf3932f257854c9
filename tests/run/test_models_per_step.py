"""A model per step on the session's Ray: vision models beside CLIP in one job, added later, compared, and never mixed up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import clipray
from clipray import tables
from clipray.errors import JobError, ModelError, SchemaError
from clipray.inputs.make_manifest import make_manifest
from clipray.inputs.vector_column import comparable, open_vectors
from clipray.job import Feature, Model
from clipray.job.load import parse_job
from clipray.models.image_encoder import ImageEncoder
from clipray.models.preprocess import preprocess_of
from clipray.models.resolve import resolve
from clipray.queries.search import search
from clipray.storage.folder import Folder

pytestmark = pytest.mark.usefixtures("ray_here")
DINO = {"name": "timm/test_vit", "pretrained": "random", "seed": 3, "precision": "fp32"}
FEATURES = {"whole": {"layer": "output"}, "middle": {"layer": "blocks.2", "pooling": "gem"}}


def write(path: Path, *steps: dict[str, Any], model: dict[str, Any] | None = None) -> str:
    job = {"output": str(path.parent / "out"), "steps": list(steps), **({"model": model} if model else {})}
    path.write_text(yaml.safe_dump(job))
    return str(path)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> str:
    path = str(tmp_path_factory.mktemp("manifest") / "m.parquet")
    make_manifest(str(pictures / "class[01]" / "0000*.jpg"), path, label=r"class\d")
    return path


def test_a_second_model_is_added_to_a_finished_job(tmp_path: Path, manifest: str, tiny_model: str) -> None:
    clip = {"name": tiny_model, "precision": "fp32"}
    images = {"embed_images": {"manifest": manifest, "keep": ["label"], "batch_size": 8}}
    clipray.run(write(tmp_path / "j.yaml", images, model=clip))
    before = (tmp_path / "out/images/_table.json").read_bytes()
    dino = {
        "embed_images": {"name": "dino", "model": DINO, "features": FEATURES, "manifest": manifest, "batch_size": 8}
    }
    probes = [
        {"probe": {"name": f"by_{table}", "input": f"{table}.{column}", "truth": "images.label", "c": [1]}}
        for table, column in (("images", "clip"), ("dino", "whole"))
    ]
    sets = {name: {"labels": f"by_{name}", "truth": "images.label"} for name in ("images", "dino")}
    figures = {"evaluate_labels": {"sets": sets, "baseline": "images", "bootstrap": 100}}
    job = write(tmp_path / "j.yaml", images, dino, *probes, figures, model=clip)

    notes = [table.note for table in clipray.run(job)]
    assert notes[0] == "was finished already"
    assert "was finished already" not in notes[1:]
    assert (tmp_path / "out/images/_table.json").read_bytes() == before
    assert {row["data_set"] for row in tables.read_table(str(tmp_path / "out/label_figures")).to_pylist()} == set(sets)
    assert {table.note for table in clipray.run(job)} == {"was finished already"}

    model = resolve(Model(**DINO))
    encoder = ImageEncoder(
        model, features={k: Feature(**v) for k, v in FEATURES.items()}, precision="fp32", batch_size=8
    )
    uris = {row["image_id"]: row["uri"] for row in tables.read_table(str(tmp_path / "out/images")).to_pylist()}
    rows = tables.read_table(str(tmp_path / "out/dino")).to_pylist()
    assert {row["image_id"] for row in rows} == uris.keys()
    for row in rows[:3]:
        with Image.open(Path(manifest).parent / uris[row["image_id"]]) as image:
            expected = encoder.encode(preprocess_of(model)(image.convert("RGB"))[None].copy()).vectors
        for name, vector in expected.items():
            assert np.abs(np.array(row[name]) - vector[0]).max() <= 1e-5

    record = json.loads((tmp_path / "out/dino/_table.json").read_text())
    assert record["provenance"]["model"]["name"] == "timm/test_vit"
    assert record["provenance"]["versions"].keys() >= {"timm", "torch"}
    spaces = [open_vectors(column, Folder(str(tmp_path / "out"))).space for column in ("images.clip", "dino.whole")]
    assert "they are of two models, local-dir and timm/test_vit" in comparable(*spaces)


def test_a_job_needs_no_model_where_every_step_has_its_own(tmp_path: Path, manifest: str) -> None:
    own = {"embed_images": {"manifest": manifest, "model": DINO, "batch_size": 8}}
    (alone,) = clipray.run(write(tmp_path / "own.yaml", own))
    # a step's own model and the job's are the same to its fingerprint
    (again,) = clipray.run(write(tmp_path / "job.yaml", {"embed_images": {"manifest": manifest}}, model=DINO))
    assert (alone.note, again.note) == ("", "was finished already")
    with pytest.raises(JobError, match="model: is missing: embed_texts needs one, of the job or its own"):
        parse_job(yaml.safe_dump({"output": "out", "steps": [own, {"embed_texts": {"manifest": manifest}}]}))


@pytest.mark.parametrize(
    "step",
    [
        {"embed_texts": {"manifest": "m"}},
        {"label": {"input": "images.clip", "classes": ["a", "b"]}},
        {"refer": {"input": "regions.clip"}},
        {"score_captions": {"manifest": "m", "input": "images.clip"}},
        {"attack": {"manifest": "m", "classes": ["a", "b"]}},
    ],
)
def test_a_step_that_encodes_texts_refuses_a_vision_model(tmp_path: Path, manifest: str, step: dict[str, Any]) -> None:
    ((kind, settings),) = step.items()
    settings = {**settings, **({"manifest": manifest} if "manifest" in settings else {})}
    steps = ({"embed_images": {"manifest": manifest}}, {kind: settings})
    for work in (clipray.run, clipray.plan):
        with pytest.raises(ModelError) as caught:
            work(write(tmp_path / "j.yaml", *steps, model=DINO))
        assert f"{kind} encodes texts, and timm/test_vit is a vision model, without a text tower" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out/images").exists()  # before any work


def test_an_index_of_a_vision_model_is_not_searched_with_words(tmp_path: Path, manifest: str) -> None:
    embed = {"embed_images": {"manifest": manifest, "model": DINO, "batch_size": 8}}
    clipray.run(write(tmp_path / "j.yaml", embed, {"index": {"input": "images.clip"}}))
    with pytest.raises(
        ModelError,
        match="is of timm/test_vit, a vision model without a text tower: search with --image PATH or --like ID",
    ):
        search(str(tmp_path / "out"), "a dog")
    uri = tables.read_table(str(tmp_path / "out/images"), ["image_id", "uri"]).to_pylist()[0]
    answer = search(str(tmp_path / "out"), image=str(Path(manifest).parent / uri["uri"]))
    assert answer.hits[0].image_id == uri["image_id"]


def test_vectors_of_two_models_are_not_compared(tmp_path: Path, manifest: str) -> None:
    other = {**DINO, "seed": 4}
    steps = [
        {"embed_images": {"manifest": manifest, "model": DINO}},
        {"embed_images": {"name": "other", "manifest": manifest, "model": other}},
        {"index": {"input": "images.clip", "queries": "other.clip"}},
    ]
    with pytest.raises(
        SchemaError, match="they are of two models, timm/test_vit and timm/test_vit, or of other weights"
    ):
        clipray.run(write(tmp_path / "j.yaml", *steps))
