"""docs/report.md runs as it stands, and its page shows what the tables say."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pytest
from support import DOCS, follow

from clipray import tables


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, ray_here: object) -> tuple[Path, str]:
    home = tmp_path_factory.mktemp("report")
    return home, follow((DOCS / "report.md").read_text(encoding="utf-8"), home)


def section(home: Path, name: str) -> str:
    page = (home / "runs/report/report/report.html").read_text(encoding="utf-8")
    return page.split(f'<section id="{name}">')[1].split("</section>")[0]


def plain(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_a_run_ends_with_the_path_of_its_page(followed: tuple[Path, str]) -> None:
    home, printed = followed
    said = re.findall(r"^report: (.*)$", printed, re.M)
    assert said == [str(home / "runs/report/report/report.html")] * 2
    assert "<h1>The same, later</h1>" in Path(said[0]).read_text(encoding="utf-8")
    assert Path(said[0]).stat().st_size < 1_500_000


def test_queries_have_the_average_precision_and_the_answers_of_the_tables(followed: tuple[Path, str]) -> None:
    home = followed[0]
    found = pl.read_parquet(home / "runs/report/retrieval/*.parquet").filter(pl.col("protocol") == "medium")
    ap = dict(zip(found["query_id"], found["ap"], strict=True))
    lists = pl.read_parquet(home / "runs/report/neighbours/*.parquet").sort("rank")
    truth = pl.read_parquet(home / "world/queries.parquet")
    blocks = section(home, "retrieval").split('class="ranking"')[1:]
    assert len(blocks) == 5
    for block in blocks:
        name, value = re.findall(r'class="name">([^<]+)', block)[0], float(re.findall(r"AP ([\d.]+)", block)[0])
        assert value == pytest.approx(ap[name], abs=5e-4)
        shown = re.findall(r'class="tile (hit|miss|junk) " title="([^ :(]+)', block)
        assert [image for _, image in shown] == lists.filter(pl.col("query_id") == name)["image_id"].to_list()[:10]
        relation = dict(truth.filter(pl.col("query_id") == name).select("image_id", "relation").iter_rows())
        marks = {None: "miss", "easy": "hit", "hard": "hit", "junk": "junk"}
        assert [mark for mark, _ in shown] == [marks[relation.get(image)] for _, image in shown]
    values = [float(value) for value in re.findall(r"AP ([\d.]+)", "".join(blocks))]
    assert values == sorted(values)
    assert values[0] == pytest.approx(min(ap.values()), abs=5e-4)
    assert values[-1] == pytest.approx(max(ap.values()), abs=5e-4)


def test_rejects_and_figures_are_those_of_the_tables(followed: tuple[Path, str]) -> None:
    home = followed[0]
    rejects = pl.read_parquet(home / "runs/report/rejects/images/*.parquet")
    assert sorted(rejects["reason"]) == ["empty", "not_an_image", "not_found"]
    text = plain(section(home, "rejects"))
    for row in rejects.iter_rows(named=True):
        assert row["image_id"] in text
    rows = {row["table"]: row for row in tables.read_table(str(home / "runs/report/report")).to_pylist()}
    assert (rows["images"]["rows"], rows["images"]["rejects"]) == (257, 3)
    assert "Retrieval" in rows["neighbours"]["sections"]
    figures = tables.read_table(str(home / "runs/report/label_figures")).to_pylist()
    right = plain(section(home, "right"))
    for row in figures:
        assert f"{100 * row['value']:.1f} %" in right
    labels = pl.read_parquet(home / "runs/report/labels/*.parquet")["label"].value_counts()
    counts = dict(labels.iter_rows())
    shown = re.findall(r"<b>([^<]+)</b>\s*<span class=\"bar\">.*?<b>(\d+)</b> rows", section(home, "labels"), re.S)
    assert len(shown) == 16
    assert all(counts[name] == int(n) for name, n in shown)
    assert int(shown[0][1]) == max(counts.values())
