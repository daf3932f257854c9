"""Labels held against what is known: scikit-learn's figures, several data sets and styles, what does not fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix

import clipray
from clipray import tables
from clipray.demo import prompts
from clipray.demo.world import write_world
from clipray.errors import ClipRayError, SchemaError, StaleTableError
from clipray.storage.folder import Folder

pytestmark = pytest.mark.usefixtures("ray_here")
NAMES = list(prompts.class_labels())
CLASSES = {"names": NAMES, "descriptions": {name: prompts.definition(name) for name in NAMES}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run: single things and things beside a word that contradicts them, labelled in two styles."""
    home = tmp_path_factory.mktemp("evaluate")
    world = write_world(home / "world", seed=5, n_scenes=96, n_groups=6, n_words=48, n_places=0, side_px=96)
    steps = [
        {"embed_images": {"manifest": str(world.images), "keep": ["label", "kind"], "batch_size": 32}},
        {"label": {"input": "images.clip", "classes": CLASSES, "styles": ["template", "description"]}},
        {"label": {"name": "bad", "input": "images.clip", "classes": {"names": NAMES, "templates": "no {} here"}}},
    ]
    clipray.run(write(home / "label.yaml", home / "run", *steps))
    return home


def write(path: Path, out: Path, *steps: dict[str, Any]) -> str:
    path.write_text(
        yaml.safe_dump({"output": str(out), "model": {"name": "demo", "precision": "fp32"}, "steps": steps})
    )
    return str(path)


def evaluate(home: Path, tmp_path: Path, **settings: Any) -> str:
    given = {"labels": f"{home}/run/labels", "truth": f"{home}/run/images.label"}
    return write(
        tmp_path / "j.yaml",
        tmp_path / "out",
        {"evaluate_labels": {**({} if "sets" in settings else given), **settings}},
    )


def found(tmp_path: Path, name: str = "label_figures") -> list[dict[str, Any]]:
    return tables.read_table(str(tmp_path / "out" / name)).to_pylist()


def one(rows: list[dict[str, Any]], **wanted: str) -> dict[str, Any]:
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def joined(home: Path, style: str, kind: str | None = None, name: str = "labels") -> Any:
    labels = tables.read_table(str(home / f"run/{name}")).to_pandas().query("style == @style")
    images = (
        tables.read_table(str(home / "run/images"), ["image_id", "label", "kind"]).to_pandas().dropna(subset="label")
    )
    both = labels.merge(images, on="image_id", suffixes=("", "_known"))
    return both if kind is None else both[both.kind == kind]


def test_figures_and_confusion_are_scikit_learns(home: Path, tmp_path: Path) -> None:
    (own, beside) = clipray.run(evaluate(home, tmp_path))
    assert (own.name, own.rows, beside.name) == ("label_figures", 10, "label_figures_confusion")
    rows = found(tmp_path)
    for style in ("template", "description"):
        both = joined(home, style)
        row = one(rows, data_set="all", style=style, metric="top1")
        assert row["value"] == pytest.approx(accuracy_score(both.label_known, both.label))
        assert row["n"] == len(both) == 144
        assert row["low"] <= row["value"] <= row["high"] < row["low"] + 0.2
        top3 = np.mean(
            [known in [t["label"] for t in top[:3]] for known, top in zip(both.label_known, both.top, strict=True)]
        )
        assert one(rows, style=style, metric="top3")["value"] == pytest.approx(top3)
        assert row["difference"] is None
    both = joined(home, "template")
    matrix = np.zeros((64, 64), int)
    for row in found(tmp_path, "label_figures_confusion"):
        if row["style"] == "template":
            matrix[NAMES.index(row["label"]), NAMES.index(row["predicted"])] = row["n"]
    assert np.array_equal(matrix, confusion_matrix(both.label_known, both.label, labels=NAMES))
    with Image.open(tmp_path / "out/label_figures_confusion/all-template.png") as picture:
        shades = np.asarray(picture.convert("L"))
    assert min(shades.shape) > 400
    assert shades.std() > 10
    metrics = tables.read_table(str(tmp_path / "out/metrics")).to_pylist()
    assert (
        one(metrics, metric="top1", group="all/template")["value"]
        == one(rows, style="template", metric="top1")["value"]
    )
    record = tables.read_record(Folder(str(tmp_path / "out/label_figures")))
    assert record is not None
    assert record.summary["known_but_not_labelled"] == {"all/template": 0, "all/description": 0}
    assert [r.note for r in clipray.run(evaluate(home, tmp_path))] == ["was finished already"] * 2


def test_styles_are_compared_row_by_row(home: Path, tmp_path: Path) -> None:
    clipray.run(evaluate(home, tmp_path, baseline="description"))
    rows = found(tmp_path)
    row = one(rows, style="template", metric="top1")
    a, b = (joined(home, style).sort_values("image_id") for style in ("template", "description"))
    expected = (a.label == a.label_known).mean() - (b.label == b.label_known).mean()
    assert (row["baseline"], row["difference"]) == ("description", pytest.approx(expected))
    assert row["difference_low"] <= expected <= row["difference_high"]
    assert one(rows, style="description", metric="top1")["difference"] is None


def test_data_sets_by_a_column_against_one_of_them(home: Path, tmp_path: Path) -> None:
    """A word that contradicts the picture costs accuracy."""
    clipray.run(evaluate(home, tmp_path, by="kind", baseline="single"))
    rows = found(tmp_path)
    assert {row["data_set"] for row in rows} == {"single", "word"}
    single, word = (joined(home, "template", kind) for kind in ("single", "word"))
    row = one(rows, data_set="word", style="template", metric="top1")
    expected = (word.label == word.label_known).mean() - (single.label == single.label_known).mean()
    assert row["difference"] == pytest.approx(expected)
    assert expected < 0
    assert row["difference_low"] < expected < row["difference_high"]
    assert one(rows, data_set="word", style="template", metric="ece")["difference"] is not None


def test_sets_of_several_runs_and_other_labels_of_the_same_rows(home: Path, tmp_path: Path) -> None:
    truth = tables.read_table(str(home / "run/images"), ["image_id", "label"]).to_pandas().dropna()
    pq.write_table(
        pa.table({"key": truth.image_id.astype(str), "shows": truth.label.astype("category")}), tmp_path / "t.parquet"
    )
    known = {"path": str(tmp_path / "t.parquet"), "column": "shows", "id": "key"}
    renamed = {"path": str(home / "run/images/*.parquet"), "column": "label", "id": "image_id"}
    sets = {
        "a": {"labels": f"{home}/run/labels", "truth": renamed, "baseline": f"{home}/run/bad"},
        "b": {"labels": f"{home}/run/bad", "truth": f"{home}/run/images.label"},
    }
    clipray.run(evaluate(home, tmp_path, sets=sets))
    rows = found(tmp_path)
    a, b = one(rows, data_set="a", style="template", metric="top1"), one(rows, data_set="b", metric="top1")
    assert a["baseline"] == f"{home}/run/bad"
    assert a["difference"] == pytest.approx(a["value"] - b["value"])
    assert one(rows, data_set="a", style="description", metric="top1")["difference"] is not None
    clipray.run(evaluate(home, tmp_path, name="c", sets={"c": {"labels": f"{home}/run/bad", "truth": known}}))
    c = one(found(tmp_path, "c"), data_set="c", style="template", metric="top1")
    assert (c["value"], c["n"]) == (b["value"], b["n"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"truth": "images.lable"}, "images is no finished table"),
        ({"labels": "{run}/images"}, "expected a table of labels, found one of images"),
        ({"truth": "{run}/images.clip"}, "column 'clip': expected strings or whole numbers, found fixed_size_list"),
        ({"truth": "{run}/images.lable"}, "no column 'lable'"),
        ({"truth": "{run}/images.kind"}, "labels that are not among the 64 classes of .*labels: '"),
        (
            {"baseline": "tempalte"},
            "baseline 'tempalte' is no data set and no style; there are: all, description, template",
        ),
        ({"truth": "label"}, "'label': expected `table.column`"),
        ({"sets": {"x": {"labels": "labels"}}}, r"sets\.x\.truth: is missing"),
        ({"bootstrap": 3}, "bootstrap: expected greater than or equal to 100"),
        ({"truth": None}, "expected `labels` and `truth`, or `sets`"),
    ],
)
def test_what_does_not_fit_together(home: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    given = {
        key: value.replace("{run}", f"{home}/run") if isinstance(value, str) else value
        for key, value in settings.items()
    }
    with pytest.raises(ClipRayError, match=message) as caught:
        clipray.run(evaluate(home, tmp_path, **given))
    assert "\n" not in str(caught.value)


def test_ids_that_stand_twice_and_changed_settings(home: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image_id": ["single-00000"] * 2, "label": [NAMES[0]] * 2}), tmp_path / "t.parquet")
    with pytest.raises(SchemaError, match="1 rows have an id that stands in an earlier row"):
        clipray.run(evaluate(home, tmp_path, truth={"path": str(tmp_path / "t.parquet"), "column": "label"}))
    clipray.run(evaluate(home, tmp_path))
    with pytest.raises(StaleTableError, match=r"bootstrap was 1000, is 200"):
        clipray.run(evaluate(home, tmp_path, bootstrap=200))
