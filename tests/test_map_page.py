"""docs/map.md runs as it stands, but for the demo's own run, of which a few tables are enough."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import yaml
from support import DOCS, follow

import clipray
from clipray import tables
from clipray.demo.world import write_world


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, ray_here: object) -> tuple[Path, str]:
    home = tmp_path_factory.mktemp("map")
    world = write_world(home / "world", seed=0, n_scenes=80, n_groups=8, n_words=0, n_places=0)
    steps = [
        {"embed_images": {"manifest": str(world.images), "keep": ["label"]}},
        {"cluster": {"input": "images.clip", "clusters": 4}},
        {"index": {"input": "images.clip"}},
        {"project": {"input": "images.clip", "index": "index"}},
    ]
    job = home / "demo.yaml"
    job.write_text(yaml.safe_dump({"output": str(home / "runs/demo"), "model": {"name": "demo"}, "steps": steps}))
    clipray.run(str(job))
    page = (DOCS / "map.md").read_text(encoding="utf-8")
    return home, follow(page.replace("\nclipray demo\n", "\n# a smaller one is there\n"), home)


def test_the_job_makes_a_map(followed: tuple[Path, str]) -> None:
    rows = tables.read_table(str(followed[0] / "runs/map/map"))
    assert rows.column_names == ["image_id", "x", "y", "neighbors"]
    assert set(rows["neighbors"].combine_chunks().field("ids").value_lengths().to_pylist()) == {15}


def test_the_atlas_has_what_the_page_names(followed: tuple[Path, str]) -> None:
    home, printed = followed
    rows = pl.read_parquet(home / "runs/demo/atlas.parquet")
    assert {"x", "y", "neighbors", "image", "image_id", "label", "cluster_id"} <= set(rows.columns)
    assert rows["image"].null_count() == 0
    assert f"embedding-atlas {home}/runs/demo/atlas.parquet --x x --y y --neighbors neighbors --image image" in printed


def test_the_cells_print_rows(followed: tuple[Path, str]) -> None:
    assert "cluster_id" in followed[1]
    assert "nearest" in followed[1]
