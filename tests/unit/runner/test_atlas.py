"""`clipray atlas`: one Parquet file of small tables that are written here, without Ray, as embedding-atlas reads it."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from clipray import tables
from clipray.cli import app
from clipray.errors import JobError
from clipray.runner import atlas
from clipray.runner.atlas import command_of, write_atlas
from clipray.storage.folder import Folder

NAMES = ["p2", "p0", "p3", "p1", "p4"]  # as the map has them
ID = pa.field("image_id", pa.string(), nullable=False)


def write(out: Path, name: str, kind: str, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    folder = Folder(str(out / name))
    data = pa.Table.from_pylist(rows, schema=schema)
    shard = tables.write_shard(folder, "part-0.parquet", kind, data, {"fingerprint": f"of-{name}"})
    facts = {"inputs": {}, "settings": {}, "provenance": {}, "finished_at": "2026-01-01T00:00:00+00:00"}
    tables.commit(folder, kind, schema, [shard], fingerprint=f"of-{name}", **facts)


def write_map(out: Path, neighbours: int | None = 2, name: str = "map", last: int = 0) -> None:
    """Each row with the rows after it as neighbours; the last row with fewer by `last`."""
    rows = []
    for n, image in enumerate(NAMES):
        count = None if neighbours is None else neighbours - (last if n == 4 else 0)
        ids = [NAMES[(n + k + 1) % 5] for k in range(count or 0)]
        near = None if count is None else {"ids": ids, "distances": [k / 8 for k in range(count)]}
        rows.append({"image_id": image, "x": n / 2, "y": -n, "neighbors": near})
    write(out, name, "map", rows, pa.schema([ID, *tables.arrow_schema("map")]))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Images in the order of their ids, one of them gone, their clusters, and a map in another order."""
    out = tmp_path / "out"
    for n in range(4):
        Image.new("RGB", (300, 200), (60 * n, 0, 0)).save(tmp_path / f"p{n}.png")
    schema = tables.arrow_schema("images", {"clip": 2}, extra=[pa.field("label", pa.string())])
    rows = [
        {"image_id": f"p{n}", "uri": str(tmp_path / f"p{n}.png"), "height": 200, "width": 300, "label": f"l{n}", "clip": [0, 1]}
        for n in range(5)
    ]  # fmt: skip
    write(out, "images", "images", rows, schema)
    clusters = [{"image_id": f"p{n}", "cluster_id": n % 2, "distance": n} for n in range(5)]
    write(out, "clusters", "clusters", clusters, pa.schema([ID, *tables.arrow_schema("clusters")]))
    (out / "events.jsonl").write_text('{"time": "2026-01-01T00:00:00+00:00", "event": "run_started", "job": "a"}\n')
    return out


def test_a_row_has_its_place_its_neighbours_by_number_and_what_is_known_of_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atlas, "AT_ONCE", 2)
    write_map(run)
    written = write_atlas(str(run), thumbnail_px=60)
    assert (written.path, written.rows) == (str(run / "atlas.parquet"), 5)
    assert written.arguments == [written.path, "--x", "x", "--y", "y", "--neighbors", "neighbors", "--image", "image"]
    assert pq.ParquetFile(written.path).num_row_groups == 3  # nothing holds all rows
    rows = pl.read_parquet(written.path)
    assert rows["image_id"].to_list() == NAMES
    assert rows["x"].to_list() == [0, 0.5, 1, 1.5, 2]
    assert rows["label"].to_list() == ["l2", "l0", "l3", "l1", "l4"]
    assert rows["cluster_id"].to_list() == ["0", "0", "1", "1", "0"]  # words: a colour each
    assert rows["neighbors"].to_list()[3] == {"ids": [4, 0], "distances": [0, 0.125]}
    images = rows["image"].to_list()
    assert images[4] is None  # its file is gone
    with Image.open(io.BytesIO(images[2]["bytes"])) as image:
        assert (image.format, image.size) == ("WEBP", (60, 40))
        assert image.getpixel((30, 20))[0] == pytest.approx(180, abs=8)
    assert not list(run.glob("*.tmp-*"))


@pytest.mark.parametrize(("neighbours", "last"), [(None, 0), (3, 1)])
def test_neighbours_that_embedding_atlas_does_not_take_are_left_to_it_to_find(
    run: Path, neighbours: int | None, last: int
) -> None:
    write_map(run, neighbours, last=last)
    written = write_atlas(str(run), str(run.parent / "a.parquet"), thumbnail_px=0)
    assert written.arguments == [str(run.parent / "a.parquet"), "--x", "x", "--y", "y"]
    lengths = pl.read_parquet(written.path)["neighbors"].struct.field("ids").list.len().to_list()
    assert lengths == ([0] * 5 if neighbours is None else [3, 3, 3, 3, 2])


def test_texts_are_shown_as_words(tmp_path: Path) -> None:
    key = pa.field("text_id", pa.string(), nullable=False)
    texts = [{"text_id": f"t{n}", "text": f"word {n}", "truncated": False, "embedding": [0, 1]} for n in range(3)]
    schema = tables.arrow_schema("texts", {"embedding": 2})
    write(tmp_path, "texts", "texts", [{name: row.get(name) for name in schema.names} for row in texts], schema)
    places = [{"text_id": f"t{n}", "x": n, "y": 0, "neighbors": None} for n in (2, 0, 1)]
    write(tmp_path, "map", "map", places, pa.schema([key, *tables.arrow_schema("map")]))
    (tmp_path / "events.jsonl").write_text(
        '{"time": "2026-01-01T00:00:00+00:00", "event": "run_started", "job": "a"}\n'
    )
    written = write_atlas(str(tmp_path))
    assert written.arguments[-2:] == ["--text", "text"]
    assert pl.read_parquet(written.path)["text"].to_list() == ["word 2", "word 0", "word 1"]


def test_what_is_missing_is_one_line(run: Path) -> None:
    with pytest.raises(JobError, match=r"no map; add a step such as `project: \{input: images\.clip, index: index\}`"):
        write_atlas(str(run))
    write_map(run)
    write_map(run, name="other")
    with pytest.raises(JobError, match="several maps; choose one with `--map`: map, other"):
        write_atlas(str(run))
    with pytest.raises(JobError, match="no map 'othr', found: map, other; did you mean 'other'"):
        write_atlas(str(run), table="othr")
    with pytest.raises(JobError, match="embedding-atlas reads local files: name one with `--to`"):
        write_atlas(str(run), "s3://bucket/a.parquet", table="map")
    with pytest.raises(JobError, match="no run there"):
        write_atlas(str(run / "nothing"))


def test_the_command_starts_embedding_atlas_or_says_how(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_map(run)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "embedding_atlas" else find(name))
    done = CliRunner().invoke(app, ["atlas", str(run), "--thumbnail-px", "0"])
    assert done.exit_code == 0
    assert 'pip install "clipray[atlas]"' in done.stderr
    assert done.stdout.splitlines()[-1] == f"embedding-atlas {run}/atlas.parquet --x x --y y --neighbors neighbors"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json"))
    command = command_of(write_atlas(str(run), thumbnail_px=0))
    assert command is not None
    assert command[1:4] == ["-m", "embedding_atlas.cli", f"{run}/atlas.parquet"]
