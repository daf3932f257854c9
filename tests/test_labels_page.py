"""docs/labels.md runs as it stands: its jobs, its commands and its code, one after the other, in a folder of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import DOCS, follow

from clipray import tables


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, ray_here: object) -> Path:
    """The folder in which the page has been followed, with a third of its pictures."""
    home = tmp_path_factory.mktemp("labels")
    page = (DOCS / "labels.md").read_text(encoding="utf-8")
    follow(page.replace("n_scenes=1024", "n_scenes=384").replace("n_words=512", "n_words=128"), home)
    return home / "runs" / "labels"


def test_the_best_style_and_the_probe_are_as_right_as_the_page_says(followed: Path) -> None:
    rows = tables.read_table(str(followed / "label_figures")).to_pylist()
    top1 = {(row["data_set"], row["style"]): row["value"] for row in rows if row["metric"] == "top1"}
    assert len(top1) == 8
    assert max(value for (data_set, _), value in top1.items() if data_set == "single") >= 0.95
    assert top1["word", "template"] < top1["single", "template"] - 0.03
    probed = {
        row["data_set"]: row["value"]
        for row in tables.read_table(str(followed / "probe_figures")).to_pylist()
        if row["metric"] == "top1"
    }
    assert probed["train"] > probed["test"] > 0.5


def test_sets_are_compared_with_other_labels_of_the_same_pictures(followed: Path) -> None:
    rows = tables.read_table(str(followed / "side_by_side")).to_pylist()
    (row,) = [r for r in rows if (r["data_set"], r["style"], r["metric"]) == ("zero-shot", "template", "top1")]
    (probe,) = [r for r in rows if (r["data_set"], r["metric"]) == ("probe", "top1")]
    assert row["baseline"] == "probe"
    assert row["difference"] == pytest.approx(row["value"] - probe["value"])
