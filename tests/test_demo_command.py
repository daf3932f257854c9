"""`clipray demo`: the whole product on the built-in world, in its own process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml
from PIL import Image
from support import CLIPRAY, ROOT

from clipray.demo.clusters import look_at_clusters
from clipray.demo.tour import nearest_pictures, style_figures
from clipray.storage import Folder
from clipray.tables import read_record, read_table

PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")


def test_demo_makes_tables_that_are_right(tmp_path: Path) -> None:
    done = subprocess.run([CLIPRAY, "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Look next at:" in done.stdout
    demo = tmp_path / "runs" / "demo"
    record = read_record(Folder(str(demo / "images")))
    assert record is not None
    assert (record.rows, record.rejects) == (464, 0)
    assert set(read_table(str(demo / "images"))["kind"].to_pylist()) == {
        "single",
        "group",
        "word",
        "place",
    }
    _, same = nearest_pictures(str(demo / "images"))
    assert same > 0.9
    views = look_at_clusters(str(demo))
    assert (len(views), sum(view.size for view in views)) == (16, 464)
    stars = max(views, key=lambda view: view.commonest == ("star", view.commonest[1]) and view.commonest[1])
    assert stars.labelled > 20  # 25 of 39 with AMX's rounding; with others some more
    assert stars.commonest[1] > 0.8 * stars.labelled  # a cluster of stars, though their colours differ
    for name in ("clusters.png", "scatter.png"):
        with Image.open(demo / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 100
    figures = {(kind, style): found["top1"] for kind, style, _, found in style_figures(str(demo / "label_figures"))}
    assert {kind for kind, _ in figures} == {"single", "word"}
    assert all(figures["single", style] >= 0.95 for style in ("template", "definition", "name_is_definition"))
    assert "Zero-shot labels, 64 classes" in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert last == f"report: {demo}/report/report.html"
    page = Path(last.removeprefix("report: ")).read_text(encoding="utf-8")
    assert page.count('class="sheet"') == 16
    assert page.count('class="ranking"') == 10  # of places, and of pictures by their captions
    assert len(page.encode()) < 1_500_000
    _follow_the_page(tmp_path)


def _follow_the_page(home: Path) -> None:
    """docs/clusters.md has the demo's own job, and its code runs on what the demo made."""
    job = yaml.safe_load((ROOT / "jobs" / "demo.yaml").read_text(encoding="utf-8"))
    steps = yaml.safe_load(re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)[0])["steps"]
    assert steps == job["steps"][: len(steps)]
    printed = ""
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S):
        done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    assert all(word in printed for word in ("labelled", "explained_variance_ratio", "silhouette", "nmi"))
