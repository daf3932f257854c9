"""Captions scored by a job: the numbers of a direct computation; pairs that fit nothing are rejected; pictures that change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from run.test_embed_texts import upstream, write_manifest

import clipray
from clipray import tables
from clipray.demo.world import DemoWorld, write_world
from clipray.errors import ManifestError, SchemaError
from clipray.storage.folder import Folder

pytestmark = pytest.mark.usefixtures("ray_here")
PREFIX = "A photo depicts "


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> DemoWorld:
    return write_world(tmp_path_factory.mktemp("world"), n_scenes=24, n_groups=4, n_words=0, n_places=0, side_px=64)


def job(home: Path, pictures: Path, pairs: Path, *, model: str = "demo", **settings: Any) -> str:
    steps = [
        {"embed_images": {"manifest": str(pictures), "batch_size": 16}},
        {"score_captions": {"input": "images.clip", "manifest": str(pairs), "batch_size": 16, **settings}},
    ]
    values = {"output": str(home / "out"), "model": {"name": model, "precision": "fp32"}, "steps": steps}
    (home / "job.yaml").write_text(yaml.safe_dump(values))
    return str(home / "job.yaml")


def pairs_of(world: DemoWorld) -> list[dict[str, Any]]:
    """Each picture with its own caption and, every third, with that of another; people's captions for most."""
    rows = pq.read_table(world.images, columns=["image_id", "caption", "captions"]).to_pylist()
    pairs = []
    for n, row in enumerate(rows):
        references: list[str | None] | None = [*row["captions"][1:], None, " "] if n % 4 else None
        other = rows[(n + 5) % len(rows)]["caption"]
        for number, caption in enumerate([row["caption"], other] if n % 3 == 0 else [row["caption"]]):
            pair = {"pair_id": f"{n}-{number}", "image_id": row["image_id"], "caption": caption}
            pairs.append({**pair, "references": references if n % 8 else [], "rating": float(n)})
    return pairs


def read(home: Path) -> dict[str, dict[str, Any]]:
    return {row["pair_id"]: row for row in tables.read_table(str(home / "out/caption_scores")).to_pylist()}


@pytest.fixture(scope="module")
def finished(world: DemoWorld, tmp_path_factory: pytest.TempPathFactory, ray_here: object) -> Path:
    """Pictures and scores of `pairs_of` the world, given in the opposite order."""
    home = tmp_path_factory.mktemp("finished")
    manifest = write_manifest(home / "pairs.parquet", pairs_of(world)[::-1], row_group_size=10)
    path = job(home, world.images, manifest, keep=["rating"], rows_per_block=8)
    assert [report.note for report in clipray.plan(path)[0]] == ["28 rows to do", "waits for images"]
    reports = clipray.run(path)
    n_pairs = len(pairs_of(world))
    assert [(r.name, r.rows, r.rejected) for r in reports] == [("images", 28, 0), ("caption_scores", n_pairs, 0)]
    return home


def test_scores_are_those_of_a_direct_computation(finished: Path, world: DemoWorld) -> None:
    pairs, found = pairs_of(world), read(finished)
    rows = tables.read_table(f"{finished}/out/images").to_pylist()
    images = {row["image_id"]: np.array(row["clip"]) for row in rows}
    texts = [text for pair in pairs for text in (pair["caption"], *(pair["references"] or [])) if text and text.strip()]
    vector_of = dict(zip(texts, upstream([PREFIX + text for text in texts]), strict=True))
    scored = []
    for pair in pairs:
        made = found[pair["pair_id"]]
        caption = vector_of[pair["caption"]]
        score = 2.5 * max(float(caption @ images[pair["image_id"]]), 0)
        assert made["clipscore"] == pytest.approx(score, abs=1e-5)
        given = [text for text in pair["references"] or [] if text and text.strip()]
        if given:
            best = max(0.0, *(float(vector_of[text] @ caption) for text in given))
            assert made["ref_clipscore"] == pytest.approx(2 * score * best / (score + best), abs=1e-5)
            scored.append(made["ref_clipscore"])
        else:
            assert made["ref_clipscore"] is None
        assert {key: made[key] for key in pair} == pair
        assert not made["truncated"]
    assert 5 < len(scored) < len(pairs)
    record = tables.read_record(Folder(f"{finished}/out/caption_scores"))
    assert record is not None
    metrics = {row["metric"]: row for row in tables.read_table(f"{finished}/out/metrics").to_pylist()}
    mean = np.mean([row["clipscore"] for row in found.values()])
    assert metrics["clipscore"]["value"] == pytest.approx(mean)
    assert record.summary["mean_clipscore"] == pytest.approx(mean, abs=1e-5)
    assert metrics["ref_clipscore"]["value"] == pytest.approx(np.mean(scored))
    assert metrics["ref_clipscore"]["n"] == len(scored)
    own = [row["clipscore"] for key, row in found.items() if key.endswith("-0")]
    others = [row["clipscore"] for key, row in found.items() if key.endswith("-1")]
    assert np.mean(own) > np.mean(others) + 0.2  # a caption of another picture fits worse


def test_pairs_without_ids_and_pairs_that_fit_nothing(world: DemoWorld, tmp_path: Path) -> None:
    pictures = pq.read_table(world.images, columns=["image_id", "uri"]).to_pylist()
    for row in pictures:
        row["uri"] = str(world.folder / row["uri"])
    given = write_manifest(tmp_path / "pictures.parquet", pictures[:10])
    rows: list[dict[str, Any]] = [{"image_id": row["image_id"], "caption": "a red star"} for row in pictures[:12]]
    rows += [{"image_id": None, "caption": "b"}, {"image_id": pictures[0]["image_id"], "caption": None}]
    rows += [{"image_id": pictures[0]["image_id"], "caption": "  "}, {**rows[0]}]
    rows += [{"image_id": pictures[1]["image_id"], "caption": "a red star " * 20}]
    manifest = write_manifest(tmp_path / "pairs.parquet", rows)
    path = job(tmp_path, given, manifest, max_reject_rate=0.5, prefix="")
    reports = clipray.run(path)
    assert (reports[1].rows, reports[1].rejected) == (11, 6)
    found = read(tmp_path)
    assert all(len(key) == 16 for key in found)
    assert sum(row["truncated"] for row in found.values()) == 1
    assert {row["ref_clipscore"] for row in found.values()} == {None}
    refused = tables.read_table(f"{tmp_path}/out/rejects/caption_scores")
    assert refused.schema.names == ["pair_id", "image_id", "caption", "stage", "reason", "message"]
    reasons = {(row["image_id"], row["caption"]): row["reason"] for row in refused.to_pylist()}
    assert reasons == {
        (pictures[10]["image_id"], "a red star"): "no_such_image",
        (pictures[11]["image_id"], "a red star"): "no_such_image",
        (None, "b"): "no_source",
        (pictures[0]["image_id"], None): "no_source",
        (pictures[0]["image_id"], "  "): "empty",
        (pictures[0]["image_id"], "a red star"): "duplicate_id",
    }
    assert f"images.clip has no image {pictures[10]['image_id']!r}" in str(refused["message"].to_pylist())
    # The pictures that were missing come: their pairs are scored, whatever had been rejected.
    write_manifest(given, pictures[:12])
    assert [report.state for report in clipray.plan(path)[0]] == ["partial", "finished"]
    reports = clipray.run(path)
    assert (reports[0].rows, reports[1].rows, reports[1].rejected) == (12, 13, 4)
    again = read(tmp_path)
    assert all(again[key] == row for key, row in found.items())
    assert [report.note for report in clipray.run(path)] == ["was finished already"] * 2


def test_pictures_of_another_model_are_refused(finished: Path, world: DemoWorld, tmp_path: Path) -> None:
    pairs = finished / "pairs.parquet"
    values = yaml.safe_load(Path(job(tmp_path, world.images, pairs, model="demo-rn")).read_text())
    values["steps"] = [{"score_captions": {"input": f"{finished}/out/images.clip", "manifest": str(pairs)}}]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(
        SchemaError, match=r"expected the output of demo-rn .*the step's model, but it is 'output' of demo"
    ) as caught:
        clipray.run(str(tmp_path / "job.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_id": ["a"], "caption": [1]}, "column `caption` is int64; expected string"),
        ({"image_id": ["a"]}, "expected a column `image_id` and `caption`: no column 'caption'; found: image_id"),
        (
            {"image_id": ["a"], "caption": ["b"], "references": ["c"]},
            r"column `references` is string; expected list<string>",
        ),
    ],
)
def test_pairs_that_are_none(columns: dict[str, list[Any]], message: str, world: DemoWorld, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.parquet"
    pq.write_table(pa.table(columns), pairs)
    path = job(tmp_path, world.images, pairs)
    values = yaml.safe_load(Path(path).read_text())
    source = {"path": str(tmp_path / "v.parquet"), "column": "v", "id": "image_id"}
    pq.write_table(pa.table({"image_id": ["a"], "v": [[0.5] * 128]}), tmp_path / "v.parquet")
    values["steps"] = [{"score_captions": {"input": source, "manifest": str(pairs)}}]
    Path(path).write_text(yaml.safe_dump(values))
    with pytest.raises(ManifestError, match=message):
        clipray.plan(path)
