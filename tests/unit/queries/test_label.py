"""`clipray label`: a few pictures at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clipray.cli import app
from clipray.demo.world import write_world
from clipray.errors import ClipRayError
from clipray.job import Classes
from clipray.queries.label import _classes


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("w"), n_scenes=40, n_groups=0, n_words=0, n_places=0).folder / "pictures"


def told(*arguments: str) -> list[dict[str, object]]:
    done = CliRunner().invoke(app, ["label", *arguments, "--model", "demo", "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.output.splitlines()]


def test_labels_with_their_probabilities(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    shown, bad = told(
        str(pictures / "single-00000.jpg"),
        str(tmp_path / "bad.jpg"),
        "--classes",
        "a blue star, a red circle, a pink ring",
    )
    labels = shown["labels"]
    assert isinstance(labels, list)
    assert labels[0]["label"] == "a red circle"
    assert sum(entry["probability"] for entry in labels) == pytest.approx(1, abs=1e-5)
    assert shown["refused"] is None
    assert str(bad["refused"]).startswith("not_an_image: ")


def test_names_that_look_like_files() -> None:
    for names in ("St. Bernard", "a.b, c.txt, d/e"):
        found = _classes(names, None)
        assert isinstance(found, Classes)
        assert found.names == names.split(", ")


def test_a_file_name_that_is_not_utf8(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes((pictures / "single-00000.jpg").read_bytes())
    (row,) = told(str(tmp_path), "--classes", "a blue star, a red circle")
    assert str(row["picture"]).endswith(r"caf\xe9.jpg")
    assert row["refused"] is None


def test_a_folder_by_a_class_file(pictures: Path) -> None:
    """More pictures than are encoded at once; class by class in the order of the demo's classes."""
    import pyarrow.parquet as pq

    rows = told(str(pictures), "--classes", str(pictures.parent / "classes.yaml"), "--top", "2")
    images = pq.read_table(pictures.parent / "images.parquet").to_pylist()
    truth = {row["uri"].split("/")[-1]: row["label"] for row in images}
    assert len(rows) == 40
    right = [row["labels"][0]["label"] == truth[str(row["picture"]).split("/")[-1]] for row in rows]  # type: ignore[index]
    assert sum(right) >= 37
    assert {len(row["labels"]) for row in rows} == {2}  # type: ignore[arg-type]


def test_the_table(pictures: Path) -> None:
    command = ["label", str(pictures / "single-00000.jpg"), "--model", "demo", "--classes", "cifar100", "--top", "3"]
    done = CliRunner().invoke(app, [*command, "--template", "photo"], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.output.count("%") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.jpg", "--classes", "a, b"], "nothing.jpg: no such image"),
        (["{p}", "--classes", "a, a"], "--classes: class 'a' stands twice"),
        (["{p}", "--classes", "a, "], "--classes: class 1 has an empty name"),
        (["{p}", "--classes", "a", "--template", "x"], "--template: the template 'x' has no"),
        (["{p}", "--classes", "none.yaml"], "none.yaml: no such class file"),
        (["{p}", "--classes", "none.csv"], "none.csv: no such class file"),
        (["{p}", "--classes", "classes.xlsx"], "--classes classes.xlsx: expected a class file"),
        (["{p}", "--classes", "lists/classes"], "--classes lists/classes: expected a class file"),
        (["{p}/*.png", "--classes", "a"], "no images there"),
    ],
)
def test_mistakes(pictures: Path, arguments: list[str], message: str) -> None:
    filled = [argument.replace("{p}", str(pictures)) for argument in arguments]
    with pytest.raises(ClipRayError, match=message):
        CliRunner().invoke(app, ["label", *filled, "--model", "demo"], catch_exceptions=False)
