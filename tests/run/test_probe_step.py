"""The probe step on the session's Ray: photos far beyond chance, splits, a fit applied elsewhere, what cannot be learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import accuracy_score
from support import PHOTOS

import clipray
from clipray import tables
from clipray.errors import ClipRayError, SchemaError
from clipray.storage.folder import Folder

pytestmark = pytest.mark.usefixtures("ray_here")
CIFAR = PHOTOS.parent / "cifar10-3000.parquet"


def write(path: Path, *steps: dict[str, Any], model: dict[str, Any] | None = None) -> str:
    job = {"output": str(path.parent / "out"), "steps": list(steps), **({"model": model} if model else {})}
    path.write_text(yaml.safe_dump(job))
    return str(path)


def write_blobs(folder: Path, n: int = 900, classes: int = 3, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Somebody's own vectors and, in another file and order, their labels. Returns `input` and `truth`."""
    rng = np.random.default_rng(seed)
    codes = np.arange(n) % classes
    x = np.random.default_rng(0).normal(size=(classes, 12))[codes] + 0.8 * rng.normal(size=(n, 12))
    ids = [f"r{row:05d}" for row in range(n)]
    folder.mkdir(exist_ok=True)
    vectors = pa.table({"key": ids, "v": pa.array(list(x.astype(np.float32)), pa.list_(pa.float32()))})
    pq.write_table(vectors, folder / "v.parquet", row_group_size=200)
    order = rng.permutation(n)
    labels = pa.table(
        {
            "key": [ids[row] for row in order],
            "shows": [f"class {codes[row]}" if row % 10 else None for row in order],
            "part": [("train", "train", "test")[row // 3 % 3] for row in order],
        }
    )
    pq.write_table(labels, folder / "l.parquet")
    return {"path": str(folder / "v.parquet"), "column": "v", "id": "key"}, {
        "path": str(folder / "l.parquet"),
        "column": "shows",
        "id": "key",
    }


def record_of(path: Path) -> tables.Record:
    record = tables.read_record(Folder(str(path)))
    assert record is not None
    return record


def test_photos_are_told_apart_far_beyond_chance(tmp_path: Path) -> None:
    """CIFAR-10 by a model that never saw a photo: chance is 10 %."""
    if not CIFAR.is_file():
        pytest.skip(f"CIFAR-10 pictures are not there: {CIFAR}")
    embed = {"embed_images": {"manifest": str(CIFAR), "keep": ["label"], "batch_size": 64}}
    probe = {"probe": {"input": "images.clip", "truth": "images.label", "c": [0.01, 0.1, 1]}}
    evaluate = {"evaluate_labels": {"labels": "probe", "truth": "images.label"}}
    clipray.run(write(tmp_path / "j.yaml", embed, probe, evaluate, model={"name": "demo", "precision": "auto"}))
    figures = record_of(tmp_path / "out/probe").summary
    assert sum(figures["rows"].values()) - figures["rows"]["validation"] == 3_000
    assert figures["test_accuracy"] >= 0.38
    assert figures["train_accuracy"] > figures["test_accuracy"]
    metrics = {
        (m["metric"], m["group"]): m["value"]
        for m in tables.read_table(str(tmp_path / "out/metrics")).to_pylist()
        if m["step"] == "probe"
    }
    assert metrics["test_accuracy", None] == figures["test_accuracy"]
    assert metrics["validation_accuracy", f"C={figures['C']:g}"] == max(figures["validation_accuracy"].values())
    rows = tables.read_table(str(tmp_path / "out/label_figures")).to_pylist()
    (top1,) = [row["value"] for row in rows if row["metric"] == "top1"]
    test, train = figures["rows"]["test"], figures["rows"]["train"]
    expected = (figures["test_accuracy"] * test + figures["train_accuracy"] * train) / 3_000
    assert top1 == pytest.approx(expected, abs=1e-9)


def test_a_probe_is_a_table_and_is_applied_to_others(tmp_path: Path) -> None:
    source, truth = write_blobs(tmp_path / "a")
    job = write(
        tmp_path / "j.yaml", {"probe": {"input": source, "truth": truth, "split": "part", "rows_per_file": 300}}
    )
    own, beside = clipray.run(job)
    assert (own.rows, beside.name, beside.rows) == (900, "probe_classes", 3)
    figures = record_of(tmp_path / "out/probe").summary
    known = pq.read_table(tmp_path / "a/l.parquet").to_pandas().dropna()
    assert figures["rows"]["test"] == (known.part == "test").sum()
    assert figures["rows"]["train"] == (known.part == "train").sum()
    labels = tables.read_table(str(tmp_path / "out/probe")).to_pandas()
    assert set(labels["style"]) == {"probe"}
    both = labels.merge(known[known.part == "test"], on="key")
    assert figures["test_accuracy"] == pytest.approx(accuracy_score(both.shows, both.label))
    assert figures["test_accuracy"] > 0.8
    assert [r.note for r in clipray.run(job)] == ["was finished already"] * 2
    # A kill: one file is gone, the coefficients stay.
    (tmp_path / "out/probe/_table.json").unlink()
    next(iter(sorted((tmp_path / "out/probe").glob("*.parquet")))).unlink()
    kept = (tmp_path / "out/probe_classes/part-000000.parquet").stat().st_mtime_ns
    clipray.run(job)
    assert (tmp_path / "out/probe_classes/part-000000.parquet").stat().st_mtime_ns == kept
    assert tables.read_table(str(tmp_path / "out/probe")).to_pandas().equals(labels)
    # The same coefficients on other rows.
    other, theirs = write_blobs(tmp_path / "b", n=150, seed=9)
    clipray.run(write(tmp_path / "k.yaml", {"probe": {"name": "again", "input": other, "fit": "probe"}}))
    found = (
        tables.read_table(str(tmp_path / "out/again"))
        .to_pandas()
        .merge(pq.read_table(theirs["path"]).to_pandas(), on="key")
        .dropna()
    )
    assert accuracy_score(found.shows, found.label) > 0.8
    coefficients = [tables.read_table(str(tmp_path / f"out/{n}_classes")).to_pylist() for n in ("probe", "again")]
    assert coefficients[0] == coefficients[1]


def test_new_rows_train_it_anew(tmp_path: Path) -> None:
    source, truth = write_blobs(tmp_path / "a", n=300)
    job = write(tmp_path / "j.yaml", {"probe": {"input": source, "truth": truth, "c": [1.0]}})
    clipray.run(job)
    before = tables.read_table(str(tmp_path / "out/probe_classes"))
    write_blobs(tmp_path / "a", n=600)
    (own, _) = clipray.run(job)
    assert own.rows == 600
    assert not tables.read_table(str(tmp_path / "out/probe_classes")).equals(before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"truth": None}, "expected one of `truth` and `fit`, found none"),
        ({"fit": "probe"}, "expected one of `truth` and `fit`, found both"),
        ({"truth": None, "fit": "probe"}, "is no finished table"),
        ({"split": "shows"}, "split 'shows': expected values `train`, `validation` and `test`, found 'class"),
        ({"split": "prat"}, "no column 'prat'; found: key, shows, part"),
        ({"c": [0]}, r"c\[0\]: expected greater than 0"),
        ({"validation_share": 0.6, "test_share": 0.5}, "leave nothing to train on"),
        ({"truth": "one"}, "are all 'same'; a probe needs two classes"),
        ({"truth": "none"}, "0 rows have a known label"),
    ],
)
def test_what_cannot_be_learnt(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    source, truth = write_blobs(tmp_path / "a", n=60)
    labels = {"one": ([f"r{row:05d}" for row in range(60)], ["same"] * 60), "none": (["x"], ["same"])}
    if settings.get("truth") in labels:
        ids, names = labels[settings["truth"]]
        pq.write_table(pa.table({"key": ids, "shows": names}), tmp_path / "a/l.parquet")
        settings = {"truth": truth}
    with pytest.raises(ClipRayError, match=message) as caught:
        clipray.run(write(tmp_path / "j.yaml", {"probe": {"input": source, "truth": truth, **settings}}))
    assert "\n" not in str(caught.value)


def test_a_fit_of_other_vectors(tmp_path: Path) -> None:
    source, truth = write_blobs(tmp_path / "a")
    clipray.run(write(tmp_path / "j.yaml", {"probe": {"input": source, "truth": truth, "c": [1.0]}}))
    pq.write_table(pa.table({"key": ["a"], "v": [[1.0, 2.0]]}), tmp_path / "n.parquet")
    narrow = {"path": str(tmp_path / "n.parquet"), "column": "v", "id": "key"}
    with pytest.raises(SchemaError, match=r"probe was fitted on vectors of 12, .* has 2"):
        clipray.run(write(tmp_path / "k.yaml", {"probe": {"name": "n", "input": narrow, "fit": "probe"}}))
