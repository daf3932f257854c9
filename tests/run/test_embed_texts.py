"""Texts through the same engine as pictures: open_clip's own vectors, rejects, new rows, kills; one space with pictures."""

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

import clipray
from clipray import tables
from clipray.demo.world import DemoWorld, write_world
from clipray.errors import ClipRayError, ManifestError, RejectRateError, SchemaError, StaleTableError
from clipray.inputs.vector_column import open_vectors, refuse_another_model, same_model
from clipray.job import Model
from clipray.models.resolve import resolve
from clipray.storage.folder import Folder

LONG = "a red circle on a gray background " * 12


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> DemoWorld:
    return write_world(tmp_path_factory.mktemp("world"), n_scenes=24, n_groups=4, n_words=4, n_places=1, side_px=64)


def write_manifest(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def job(home: Path, manifest: Path, *, pictures: Path | None = None, **settings: Any) -> str:
    """A job with an `embed_texts` step, and before it one for pictures; returns the path of its file."""
    steps: list[dict[str, Any]] = [{"embed_images": {"manifest": str(pictures)}}] if pictures else []
    steps.append({"embed_texts": {"manifest": str(manifest), "batch_size": 16, **settings}})
    values = {"output": str(home / "out"), "model": {"name": "demo", "precision": "fp32"}, "steps": steps}
    (home / "job.yaml").write_text(yaml.safe_dump(values))
    return str(home / "job.yaml")


def upstream(texts: list[str]) -> np.ndarray:
    """open_clip's own vectors of the demo model."""
    model = resolve(Model(name="demo"))
    open_clip.add_model_config(model.config)
    network = open_clip.create_model("demo", pretrained=model.pretrained).eval()
    with torch.inference_mode():
        return network.encode_text(open_clip.get_tokenizer("demo")(texts), normalize=True).numpy()


def read(home: Path) -> dict[str, dict[str, Any]]:
    return {row["text_id"]: row for row in tables.read_table(str(home / "out/texts")).to_pylist()}


@pytest.fixture(scope="module")
def finished(world: DemoWorld, tmp_path_factory: pytest.TempPathFactory, ray_here: object) -> Path:
    """The world's pictures and captions, by one job."""
    home = tmp_path_factory.mktemp("finished")
    clipray.run(job(home, world.texts, pictures=world.images))
    return home


def test_vectors_are_open_clips(finished: Path, world: DemoWorld) -> None:
    given = pq.read_table(world.texts).to_pylist()
    found = read(finished)
    assert found.keys() == {row["text_id"] for row in given}
    matrix = np.array([found[row["text_id"]]["embedding"] for row in given], np.float32)
    assert np.abs(matrix - upstream([row["text"] for row in given])).max() <= 1e-5
    for row in given:
        made = found[row["text_id"]]
        assert (made["text"], made["image_id"], made["truncated"]) == (row["text"], row["image_id"], False)


def test_the_table_says_what_it_is(finished: Path) -> None:
    record = tables.read_record(Folder(f"{finished}/out/texts"))
    assert record is not None
    assert record.table == "texts"
    assert list(record.columns) == ["text_id", "text", "truncated", "embedding", "image_id"]
    assert record.provenance["features"] == {"embedding": "output"}
    assert record.provenance["model"]["precision"] == "fp32"
    assert record.workers[0]["batch_size"] == 16
    table = tables.read_table(f"{finished}/out/texts")
    tables.check("texts", table, table.schema)


def test_texts_and_pictures_share_a_space(finished: Path) -> None:
    """Captions are nearest to their own picture more often than to most others, and the two columns say that they may."""
    output = Folder(f"{finished}/out")
    pictures, texts = open_vectors("images.clip", output), open_vectors("texts.embedding", output)
    assert same_model(pictures, texts.space["model"])
    assert texts.ids == ("text_id",)
    model = resolve(Model(name="demo"))
    refuse_another_model(pictures, model.identity(), model.embed_dim)
    with pytest.raises(
        SchemaError, match=r"expected the output of demo-rn \(sha256:.*but it is 'output' of demo \(sha"
    ):
        refuse_another_model(pictures, resolve(Model(name="demo-rn")).identity(), 128)
    images = tables.read_table(f"{finished}/out/images", ["image_id", "clip"]).to_pylist()
    matrix = np.array([row["clip"] for row in images])
    own = {row["image_id"]: n for n, row in enumerate(images)}
    ranks = []
    for row in read(finished).values():
        cosines = matrix @ np.array(row["embedding"])
        ranks.append(int((cosines > cosines[own[row["image_id"]]]).sum()))
    assert np.mean(ranks) < len(images) / 4


def test_a_finished_run_does_nothing(finished: Path) -> None:
    reports = clipray.run(str(finished / "job.yaml"))
    assert [report.note for report in reports] == ["was finished already"] * 2


@pytest.mark.usefixtures("ray_here")
def test_rejects_cut_texts_and_kept_columns(tmp_path: Path) -> None:
    rows = [{"text_id": f"t{n}", "text": f"a red circle number {n}", "lang": "en"} for n in range(30)]
    rows[3]["text"], rows[4]["text"], rows[5]["text"] = None, "", " \t\n "  # type: ignore[assignment]
    rows[6]["text"] = LONG
    rows += [{"text_id": None, "text": "a", "lang": "en"}, {"text_id": "t9", "text": "again", "lang": "en"}]  # type: ignore[dict-item]
    manifest = write_manifest(tmp_path / "m.parquet", rows, row_group_size=7)
    with pytest.raises(RejectRateError, match=r"5 of 32 rows were rejected .* See .*; repair the rows"):
        clipray.run(job(tmp_path, manifest, keep=["lang"], max_reject_rate=0.1, rows_per_block=4))
    (report,) = clipray.run(job(tmp_path, manifest, keep=["lang"], max_reject_rate=0.2, rows_per_block=4))
    assert (report.rows, report.rejected, report.total) == (27, 5, 32)
    refused = tables.read_table(f"{tmp_path}/out/rejects/texts")
    assert refused.schema.names == ["text_id", "text", "stage", "reason", "message"]
    found = {row["text_id"]: (row["text"], row["stage"], row["reason"]) for row in refused.to_pylist()}
    assert found == {
        "t3": (None, "manifest", "no_source"),
        "t4": ("", "manifest", "empty"),
        "t5": (" \t\n ", "manifest", "empty"),
        None: ("a", "manifest", "null_id"),
        "t9": ("again", "manifest", "duplicate_id"),
    }
    made = read(tmp_path)
    assert [key for key, row in made.items() if row["truncated"]] == ["t6"]
    assert np.abs(np.array(made["t6"]["embedding"]) - upstream([LONG])[0]).max() <= 1e-5
    assert made["t9"]["text"] == "a red circle number 9"
    assert {row["lang"] for row in made.values()} == {"en"}
    assert "image_id" not in made["t0"]
    rows[3]["text"] = "now it is there"  # a changed row, also a rejected one, is made again
    rows[0]["text"] = "another text"
    before = made["t1"]
    (report,) = clipray.run(job(tmp_path, write_manifest(manifest, rows), keep=["lang"], max_reject_rate=0.2))
    assert (report.rows, report.rejected) == (28, 4)
    made = read(tmp_path)
    assert (made["t3"]["text"], made["t0"]["text"]) == ("now it is there", "another text")
    assert made["t1"] == before


@pytest.mark.usefixtures("ray_here")
def test_new_rows_are_added_gone_ones_removed_and_changed_settings_noticed(tmp_path: Path) -> None:
    rows = [{"text_id": f"t{n}", "text": f"text {n}", "image_id": f"i{n % 3}" if n % 2 else None} for n in range(20)]
    clipray.run(job(tmp_path, write_manifest(tmp_path / "m.parquet", rows[:12])))
    first = read(tmp_path)
    assert first["t0"]["image_id"] is None
    path = job(tmp_path, write_manifest(tmp_path / "m.parquet", rows[2:]))
    (planned,), lines = clipray.plan(path)
    assert (planned.state, planned.note) == ("partial", "8 rows to do")
    assert not any("decoding" in line for line in lines)
    clipray.run(path)
    second = read(tmp_path)
    assert second.keys() == {row["text_id"] for row in rows[2:]}
    assert all(second[key] == first[key] for key in second.keys() & first.keys())
    with pytest.raises(StaleTableError, match="normalize was 'l2', is 'none'"):
        clipray.run(job(tmp_path, tmp_path / "m.parquet", normalize="none"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"text_id": ["a"], "text": [7]},
            r"column `text` is int64; expected string: cast it when you write the manifest",
        ),
        ({"text_id": [0.5], "text": ["a"]}, r"column `text_id` is double; expected strings, whole numbers or UUIDs"),
        ({"text_id": ["a"], "text": ["a"], "image_id": [0.5]}, r"column `image_id` is double; expected strings, whole"),
        ({"text_id": ["a"], "caption": ["a"]}, r"expected a column `text`: no column 'text'; found: text_id, caption"),
        ({"image_id": ["a"], "text": ["a"]}, r"no column 'text_id'; found: image_id, text"),
    ],
)
def test_a_manifest_that_is_none(columns: dict[str, list[Any]], message: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=message) as caught:
        clipray.plan(job(tmp_path, tmp_path / "m.parquet"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [["text"], ["embedding"], ["lang", "lang"]])
def test_names_that_are_taken(keep: list[str], tmp_path: Path) -> None:
    with pytest.raises(ClipRayError, match=r"the column name '\w+' is taken: drop it from `keep`"):
        clipray.plan(job(tmp_path, tmp_path / "m.parquet", keep=keep))
