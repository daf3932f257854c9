"""docs/labels.md runs as it stands: its jobs, its commands and its code, one after the other, in a folder of their own."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import CLIPRAY, ROOT

from clipray import tables

PAGE = (ROOT / "docs" / "labels.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the page has been followed, with a third of its pictures."""
    home = tmp_path_factory.mktemp("labels")
    page = PAGE.replace("n_scenes=1024", "n_scenes=384").replace("n_words=512", "n_words=128")
    for kind, text in re.findall(r"^```(\w+)\n(.*?)^```", page, re.M | re.S):
        if kind == "yaml":
            (home / text.splitlines()[0].removeprefix("# ")).write_text(text, encoding="utf-8")
        lines = [shlex.split(line) for line in text.splitlines()] if kind == "bash" else []
        for command in [[sys.executable, "-c", text]] if kind == "python" else [[CLIPRAY, *line[1:]] for line in lines]:
            done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
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
