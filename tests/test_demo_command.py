"""`clipray demo`: the whole product on the built-in world."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import yaml
from PIL import Image
from support import ROOT, clipray_here, python_here

from clipray.demo.tour import look_at_clusters, nearest_images, style_figures
from clipray.storage.folder import Folder
from clipray.tables import read_record, read_table

PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")


def test_demo_makes_tables_that_are_right(demo_run: tuple[Path, str]) -> None:
    home, printed = demo_run
    assert "Look next at:" in printed
    demo = home / "runs" / "demo"
    record = read_record(Folder(str(demo / "images")))
    assert record is not None
    assert (record.rows, record.rejects) == (464, 0)
    assert set(read_table(str(demo / "images"))["kind"].to_pylist()) == {
        "single",
        "group",
        "word",
        "place",
    }
    _, same = nearest_images(str(demo / "images"))
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
    assert "Zero-shot labels, 64 classes" in printed
    _look_at_duplicates(demo)
    _search_as_it_says(printed, home)
    *_, made, last = printed.strip().splitlines()
    assert last == "  clipray serve runs/demo"
    assert made == f"report: {demo}/report/report.html"
    page = Path(made.removeprefix("report: ")).read_text(encoding="utf-8")
    assert page.count('class="sheet"') == 16 + 24  # of clusters, and of near duplicates
    assert "all 464 rows of map" in page
    assert page.count('class="ranking"') == 10  # of places, and of pictures by their captions
    assert len(page.encode()) < 1_500_000
    _follow_the_page(home)


def _look_at_duplicates(demo: Path) -> None:
    """Groups of near duplicates among single things are of one thing each."""
    labels = _labels(demo)
    duplicates = read_table(str(demo / "duplicates"), ["image_id", "group_id", "kept"]).to_pylist()
    groups = {row["group_id"]: set() for row in duplicates if row["kept"]}
    for row in duplicates:
        groups[row["group_id"]].add(labels[row["image_id"]])
    assert len(groups) > 10
    assert all(len(group) == 1 for group in groups.values() if group != {None})


def _search_as_it_says(printed: str, home: Path) -> None:
    """The printed hint finds what it looks for."""
    (hint,) = (line for line in printed.splitlines() if line.startswith("  clipray search "))
    assert hint.strip() == 'clipray search runs/demo "a red circle"'
    hits = json.loads(clipray_here([*shlex.split(hint)[1:], "--top", "5", "--json"], home))
    labels = _labels(home / "runs" / "demo")
    assert [labels[hit["image_id"]] for hit in hits] == ["red circle"] * 5


def _labels(demo: Path) -> dict[str, str | None]:
    images = read_table(str(demo / "images"), ["image_id", "label"])
    return dict(zip(images["image_id"].to_pylist(), images["label"].to_pylist(), strict=True))


def _follow_the_page(home: Path) -> None:
    """docs/clusters.md has the demo's own job, and its code runs on what the demo made."""
    job = yaml.safe_load((ROOT / "jobs" / "demo.yaml").read_text(encoding="utf-8"))
    steps = yaml.safe_load(re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)[0])["steps"]
    assert steps == job["steps"][: len(steps)]
    printed = ""
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S):
        printed += python_here(code, home)
    assert all(word in printed for word in ("labelled", "explained_variance_ratio", "silhouette", "nmi"))
