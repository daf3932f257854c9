"""The label step on the session's Ray: the demo's pictures by three prompt styles, resumed, extended, refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import clipray
from clipray import tables
from clipray.demo import prompts
from clipray.demo.world import write_world
from clipray.errors import ClipRayError, SchemaError, StaleTableError
from clipray.storage.folder import Folder

pytestmark = pytest.mark.usefixtures("ray_here")
NAMES = list(prompts.class_labels())
CLASSES = {"names": NAMES, "descriptions": {name: prompts.definition(name) for name in NAMES}}
STYLES = ["template", "description", "name_is_description"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures of the demo world and a run that has embedded them."""
    home = tmp_path_factory.mktemp("world")
    made = write_world(home / "world", seed=3, n_scenes=128, n_groups=0, n_words=0, n_places=0, side_px=96)
    embed = {"embed_images": {"manifest": str(made.images), "keep": ["label"], "batch_size": 32}}
    clipray.run(write(home / "embed.yaml", home / "run", embed))
    return home


def write(path: Path, out: Path, *steps: dict[str, Any], model: str = "demo") -> str:
    path.write_text(yaml.safe_dump({"output": str(out), "model": {"name": model, "precision": "fp32"}, "steps": steps}))
    return str(path)


def label(home: Path, tmp_path: Path, **settings: Any) -> str:
    """A job that labels the world's vectors into `tmp_path`/out."""
    step = {"input": f"{home}/run/images.clip", "classes": CLASSES, **settings}
    return write(tmp_path / "j.yaml", tmp_path / "out", {"label": step})


def rows(out: Path, name: str = "labels") -> pa.Table:
    return tables.read_table(str(out / name))


def accuracy(table: pa.Table, truth: dict[str, str]) -> float:
    return float(
        np.mean([truth[i] == label for i, label in zip(table["image_id"].to_pylist(), table["label"].to_pylist())])
    )


def truth_of(home: Path) -> dict[str, str]:
    images = tables.read_table(str(home / "run/images"), ["image_id", "label"])
    return dict(zip(images["image_id"].to_pylist(), images["label"].to_pylist(), strict=True))


def test_three_styles_find_what_is_drawn(world: Path, tmp_path: Path) -> None:
    job = label(world, tmp_path, styles=STYLES, top=3)
    own, beside = clipray.run(job)
    assert (own.name, own.rows, own.total) == ("labels", 384, 384)
    assert (beside.name, beside.rows) == ("labels_classes", 192)
    found, truth = rows(tmp_path / "out"), truth_of(world)
    for style in STYLES:
        table = found.filter(np.equal(found["style"].to_numpy(), style))
        assert table.num_rows == 128
        assert accuracy(table, truth) >= 0.95
    first = found.slice(0, 1).to_pylist()[0]
    assert first["top"][0]["label"] == first["label"]
    assert len(first["top"]) == 3
    assert first["probability"] == first["top"][0]["probability"]
    assert first["margin"] == pytest.approx(first["probability"] - first["top"][1]["probability"])
    record = tables.read_record(Folder(str(tmp_path / "out/labels_classes")))
    assert record is not None
    assert record.provenance["logit_scale"] > 1
    assert record.provenance["text_precision"] == "fp32"
    assert [r.note for r in clipray.run(job)] == ["was finished already"] * 2


def test_a_killed_run_goes_on_and_new_rows_are_labelled(world: Path, tmp_path: Path) -> None:
    source = tmp_path / "v"
    source.mkdir()
    images = tables.read_table(str(world / "run/images"), ["image_id", "clip"])
    for n in range(3):
        pq.write_table(images.slice(n * 40, 40), source / f"{n}.parquet", row_group_size=20)
    given = {"path": str(source), "column": "clip"}
    job = label(world, tmp_path, input=given, styles=STYLES[:2], rows_per_file=40)
    clipray.run(job)
    out = tmp_path / "out/labels"
    before, files = rows(tmp_path / "out"), sorted(out.glob("*.parquet"))
    assert [f.name for f in files[:2]] == ["part-000000-description.parquet", "part-000000-template.parquet"]
    assert len(files) == 6
    (out / "_table.json").unlink()
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:300])
    kept = {f: f.stat().st_mtime_ns for f in (files[0], *files[3:])}
    classes = (tmp_path / "out/labels_classes/part-000000.parquet").stat().st_mtime_ns
    (planned,), lines = clipray.plan(job)
    assert planned.state == "partial"
    assert "template (64 classes), description (64 classes)" in lines[0]
    clipray.run(job)
    assert rows(tmp_path / "out").equals(before)
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    pq.write_table(images.slice(120, 8), source / "3.parquet")
    (own, _) = clipray.run(job)
    assert own.rows == 256
    assert (tmp_path / "out/labels_classes/part-000000.parquet").stat().st_mtime_ns == classes
    with pytest.raises(StaleTableError, match="top was 5, is 2"):
        clipray.run(label(world, tmp_path, input=given, styles=STYLES[:2], top=2))
    other = {**CLASSES, "names": NAMES[:-1], "descriptions": dict(list(CLASSES["descriptions"].items())[:-1])}  # type: ignore[attr-defined]
    with pytest.raises(StaleTableError, match=r"classes\.styles\.template was"):
        clipray.run(label(world, tmp_path, input=given, styles=STYLES[:2], classes=other))


def test_classes_from_files(world: Path, tmp_path: Path) -> None:
    """YAML, Parquet with descriptions, Parquet with the prompts themselves: the same labels."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**CLASSES, "templates": "a photo of a {}"}))
    said = list(CLASSES["descriptions"].items())  # type: ignore[attr-defined]
    pq.write_table(
        pa.table({"label": [n for n, _ in said], "description": [t for _, t in said]}), tmp_path / "d.parquet"
    )
    shutil.copy(world / "world/classes.parquet", tmp_path / "p.parquet")
    styles = {"definition": {"prompt": "description"}}
    found = {}
    for name, asked in {"c.yaml": styles, "d.parquet": styles, "p.parquet": ["definition"]}.items():
        clipray.run(label(world, tmp_path, name=f"t{name[0]}", classes=str(tmp_path / name), styles=asked))
        found[name] = rows(tmp_path / "out", f"t{name[0]}").sort_by("image_id")
    assert found["c.yaml"].equals(found["d.parquet"])
    assert found["c.yaml"]["label"].equals(found["p.parquet"]["label"])
    clipray.run(label(world, tmp_path, name="all", classes=str(tmp_path / "p.parquet")))
    assert set(rows(tmp_path / "out", "all")["style"].to_pylist()) == set(prompts.PROMPT_STYLES)


def test_several_labels_a_picture(world: Path, tmp_path: Path) -> None:
    """Colours and shapes against `a photo`: both are in the picture, and few others."""
    names = [*prompts.COLOURS, *prompts.SHAPES]
    multi = {"negative": "a photo", "threshold": 0.6}
    clipray.run(label(world, tmp_path, classes=names, multi_label=multi, top=8))
    found, truth = rows(tmp_path / "out"), truth_of(world)
    hits = [sum(entry["label"] in truth[row["image_id"]].split() for entry in row["top"]) for row in found.to_pylist()]
    assert np.mean(hits) >= 1.0
    for row in found.to_pylist():
        assert all(entry["probability"] >= 0.6 for entry in row["top"])
        assert (row["label"] is None) == (not row["top"])
    classes = rows(tmp_path / "out", "labels_classes").to_pylist()
    assert [(row["label"], row["negative"]) for row in classes[-2:]] == [(names[-1], False), (None, True)]
    with pytest.raises(ClipRayError, match="demo has no logit_bias of its own: give a `negative`"):
        clipray.run(label(world, tmp_path, name="other", classes=names, multi_label={"threshold": 0.5}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ["a", "b", "a"]}, "class 'a' stands twice"),
        (
            {"classes": {"names": ["a"], "templates": "a photo"}},
            r"template 'a photo' has no `\{\}` where the name goes",
        ),
        ({"classes": "nothing.yaml"}, "nothing.yaml: no such class file"),
        (
            {"classes": "dogs"},
            r"expected a file \(\.yaml, \.yml, \.json, \.parquet, \.pq, \.csv, \.txt\), cifar100 or imagenet, or a list of names",
        ),
        ({"classes": ["a"], "styles": ["description"]}, "needs `descriptions`, a text for each class"),
        ({"classes": ["a"], "styles": ["templat"]}, "style 'templat': expected template, description, name_is_"),
        (
            {"classes": {"names": ["a", "b"], "descriptions": {"a": "x"}}, "styles": ["description"]},
            "style description: no description of 'b'",
        ),
        ({"classes": {"names": [1, "b"]}}, "expected a string, found 1"),
        ({"classes": 3}, "classes: expected a string, a list of strings or a mapping of `names`"),
        ({"top": 0}, "top: expected greater than or equal to 1"),
        ({"styles": {"x": {"prompt": "template", "descriptions": "d.yaml"}}}, "`descriptions` goes with"),
        ({"input": "images.clip"}, "images is no finished table"),
    ],
)
def test_what_cannot_be_labelled(world: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ClipRayError, match=message) as caught:
        clipray.run(label(world, tmp_path, **settings))
    assert "\n" not in str(caught.value)


def test_vectors_of_another_model_or_layer_or_not_finite(world: Path, tmp_path: Path) -> None:
    step = {"label": {"input": f"{world}/run/images.clip", "classes": NAMES}}
    job = write(tmp_path / "rn.yaml", tmp_path / "out", step, model="demo-rn")
    with pytest.raises(
        SchemaError,
        match=r"images\.clip: expected the output of demo-rn .*, the step's model, but it is 'output' of demo ",
    ):
        clipray.run(job)
    reduce = {"reduce": {"input": f"{world}/run/images.clip", "components": 16}}
    job = write(tmp_path / "r.yaml", tmp_path / "out", reduce, {"label": {"input": "reduced.clip", "classes": NAMES}})
    with pytest.raises(SchemaError, match="the step's model, but it is made of such vectors"):
        clipray.run(job)
    bad = np.ones((3, 128), np.float32)
    bad[1, 5] = np.inf
    pq.write_table(pa.table({"image_id": ["a", "b", "c"], "v": list(bad)}), tmp_path / "v.parquet")
    with pytest.raises(SchemaError, match="vectors that are not finite, image_id: 'b'"):
        clipray.run(label(world, tmp_path, name="bad", input={"path": str(tmp_path / "v.parquet"), "column": "v"}))
    pq.write_table(pa.table({"image_id": ["a"], "v": [[1.0, 2.0, 3.0]]}), tmp_path / "n.parquet")
    with pytest.raises(SchemaError, match=r"vectors of 3, but demo .* makes vectors of 128"):
        clipray.run(label(world, tmp_path, name="bad", input={"path": str(tmp_path / "n.parquet"), "column": "v"}))
