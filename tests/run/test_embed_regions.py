"""Regions in a run: rows beside those of their pictures, complete after any interruption, right to the last digit."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from run.test_embed import reasons, vectors
from support import draw_pictures, write_job

import clipray
from clipray import status, tables
from clipray.errors import StaleTableError
from clipray.job import Feature, Model
from clipray.models.geometry import boxes_to_cells, geometry, keep_aspect_size
from clipray.models.image_encoder import ImageEncoder
from clipray.models.pooling import pool_boxes
from clipray.models.resolve import resolve
from clipray.runner import run
from clipray.storage.folder import Folder

pytestmark = pytest.mark.usefixtures("ray_here")

FEATURES = {
    "clip": {"layer": "output"},
    "mac": {"layer": "conv1", "pooling": "mac"},
    "rmac": {"layer": "conv1", "pooling": "rmac"},
    "local": {"layer": "tokens", "pooling": "rmac", "regions": True},
}
BOX_TYPE = pa.list_(pa.list_(pa.float64()))
REGIONS = 62 * 5 + 12 * 4 + 2
"""Of `finished`: five squares for each picture, four good boxes for every five pictures, one for `tall` and for `wide`."""

# What becomes of each box of a picture of `height` x `width` px: None a row, "clipped" a row, else the reason.
KINDS: list[list[tuple[str | None, tuple[float, float, float, float] | None]]] = [
    [],
    [(None, (0.4, 0.4, 0.6, 0.6))],
    [("clipped", (-0.1, 0.3, 0.7, 1.1)), (None, (0, 0, 1, 1))],
    [("empty_box", (0.5, 0.5, 0.5, 0.6)), (None, (0.45, 0.3, 0.9, 0.8)), ("empty_box", (1.1, 0, 1.2, 0.5))],
    [("empty_box", None), ("empty_box", (float("nan"), 0, 1, 1))],
]


def row(uri: Path, number: int) -> dict[str, Any]:
    with Image.open(uri) as image:
        sides = np.array([image.width, image.height] * 2)
    boxes = [None if box is None else (np.array(box) * sides).tolist() for _, box in KINDS[number % len(KINDS)]]
    # a picture without boxes has none or an empty list
    return {"image_id": uri.stem, "uri": str(uri), "boxes": boxes or (None if number % 2 else [])}


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    schema = pa.schema([("image_id", pa.string()), ("uri", pa.string()), ("boxes", BOX_TYPE)])
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, row_group_size=20)


def region_rows(home: Path, name: str = "regions") -> dict[str, dict[str, Any]]:
    """By region_id, which is unique."""
    table = tables.read_table(str(home / "out" / name))
    rows = {r["region_id"]: r for r in table.to_pylist()}
    assert len(rows) == len(table)
    return rows


def assert_same_regions(found: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> None:
    assert found.keys() == expected.keys()
    for region_id, one in found.items():
        other = expected[region_id]
        assert (one["image_id"], one["scale"], one["clipped"]) == (other["image_id"], other["scale"], other["clipped"])
        assert one["box_xyxy"] == other["box_xyxy"]
        np.testing.assert_allclose(one["local"], other["local"], atol=1e-6)


def assert_complete(home: Path) -> None:
    """Each picture has as many regions as its row says, and each region has its picture."""
    images = tables.read_table(str(home / "out" / "images"), ["image_id", "region_count"]).to_pylist()
    counts = Counter(r["image_id"] for r in region_rows(home).values())
    assert {r["image_id"]: r["region_count"] for r in images if r["region_count"]} == counts


def record(home: Path, table: str) -> dict[str, Any]:
    return json.loads((home / "out" / table / "_table.json").read_text())


def job(home: Path, model: str, **settings: Any) -> str:
    settings = {"features": FEATURES, "batch_size": 8, "max_reject_rate": 0.1, **settings}
    return write_job(home / "job.yaml", home / "m.parquet", model, **settings)


def events(home: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (home / "out" / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == name]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Manifest rows: 60 pictures, a wide and a tall one with boxes beside the crop, and one that is no picture."""
    folder = tmp_path_factory.mktemp("drawn")
    draw_pictures(folder, 60)
    rows = [row(path, number) for number, path in enumerate(sorted(folder.rglob("*.jpg")))]
    noise = np.random.default_rng(0).integers(0, 255, (120, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "tall.png")
    Image.fromarray(noise.transpose(1, 0, 2)).save(folder / "wide.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    beside, seen = [0, 0, 30, 20], [0, 0, 50, 50]
    rows += [
        {"image_id": "tall", "uri": str(folder / "tall.png"), "boxes": [beside, seen]},  # `seen` is also clipped
        {"image_id": "wide", "uri": str(folder / "wide.png"), "boxes": [seen, beside]},
        {"image_id": "broken", "uri": str(folder / "broken.jpg"), "boxes": [beside]},
    ]
    return rows


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[dict[str, Any]], tiny_model: str, ray_here: object
) -> Path:
    """An uninterrupted run in several shards."""
    home = tmp_path_factory.mktemp("finished")
    write_manifest(home / "m.parquet", drawn)
    clipray.run(job(home, tiny_model, decode_in="actors", rows_per_block=8, rows_per_file=16))
    return home


@pytest.fixture
def mine(finished: Path, tiny_model: str, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoiled."""
    shutil.copytree(finished / "out", tmp_path / "out")
    shutil.copy(finished / "m.parquet", tmp_path / "m.parquet")
    job(tmp_path, tiny_model)
    return tmp_path


# --- the rows


def maps_by_hand(visual: Any, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`conv1` and `tokens` of open_clip's ViT, step by step."""
    conv = visual.conv1(batch)
    x = conv.flatten(2).permute(0, 2, 1)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    x = visual.ln_post(visual.transformer(visual.ln_pre(x)))
    return conv, x[:, 1:].permute(0, 2, 1).unflatten(2, conv.shape[2:])


def test_rows_are_what_open_clip_and_pooling_give(finished: Path, drawn: list[dict[str, Any]], tiny_model: str) -> None:
    import open_clip

    network, _, preprocess = open_clip.create_model_and_transforms(tiny_model)
    visual = network.eval().visual
    found = {name: vectors(finished / "out" / "images", name) for name in FEATURES}
    regions = region_rows(finished)
    assert len(found["clip"]) == len(drawn) - 1
    for one in [*drawn[:10], drawn[-3], drawn[-2]]:
        image_id, image = one["image_id"], Image.open(one["uri"])
        batch = preprocess(image)[None]
        with torch.inference_mode():
            clip = network.encode_image(batch, normalize=True)[0]
            conv, tokens = (F.normalize(x, dim=1) for x in maps_by_hand(visual, batch))
        corners = [(0, 0, 4), *((top, left, 2) for top in (0, 2) for left in (0, 2))]  # 4 x 4 cells, side 8 / 3
        of_conv, of_tokens = (
            F.normalize(torch.stack([x[0, :, t : t + w, v : v + w].amax((1, 2)) for t, v, w in corners]), dim=1)
            for x in (conv, tokens)
        )
        expected = {
            "clip": clip,
            "mac": F.normalize(conv[0].amax((1, 2)), dim=0),
            "rmac": F.normalize(of_conv.sum(0), dim=0),
            "local": F.normalize(of_tokens.sum(0), dim=0),
        }
        for name, vector in expected.items():
            assert np.abs(found[name][image_id] - vector.numpy()).max() <= 1e-5, name
        for n, vector in enumerate(of_tokens):
            assert np.abs(np.array(regions[f"{image_id}#g{n}"]["local"]) - vector.numpy()).max() <= 1e-5
        where = geometry(image.height, image.width, {"size": [64, 64]})
        for n, box in enumerate(one["boxes"] or ()):
            region = regions.get(f"{image_id}#b{n}")
            if region is not None:
                cells = torch.from_numpy(boxes_to_cells(where, np.array([box]).clip(0), 4, 4))
                vector = F.normalize(pool_boxes(tokens, cells, torch.tensor([0])), dim=1)[0]
                assert np.abs(np.array(region["local"]) - vector.numpy()).max() <= 1e-5


def test_regions_are_complete_and_say_where_they_are(finished: Path, drawn: list[dict[str, Any]]) -> None:
    assert_complete(finished)
    regions = region_rows(finished)
    sizes = {r["image_id"]: (r["height"], r["width"]) for r in _rows(finished, ["image_id", "height", "width"])}
    for number, one in enumerate(drawn[:60]):
        image_id, (height, width) = one["image_id"], sizes[one["image_id"]]
        mine = {key: r for key, r in regions.items() if r["image_id"] == image_id}
        wanted = {f"{image_id}#g{n}": (1 if n == 0 else 2, False) for n in range(5)}
        for n, (what, _) in enumerate(KINDS[number % len(KINDS)]):
            if what in (None, "clipped"):
                wanted[f"{image_id}#b{n}"] = (None, what == "clipped")
                box = np.array(one["boxes"][n]).clip(0, [width, height] * 2)
                assert mine[f"{image_id}#b{n}"]["box_xyxy"] == pytest.approx(box.tolist(), abs=1e-4)
        assert {key: (r["scale"], r["clipped"]) for key, r in mine.items()} == wanted
        side, spare = min(height, width), abs(height - width) / 2
        left, top = (spare, 0) if width > height else (0, spare)
        whole = [left, top, left + side, top + side]  # the centre crop, but for rounding
        assert mine[f"{image_id}#g0"]["box_xyxy"] == pytest.approx(whole, abs=2)


def _rows(home: Path, columns: list[str]) -> list[dict[str, Any]]:
    return tables.read_table(str(home / "out" / "images"), columns).to_pylist()


def test_refused_boxes_are_rows_with_reasons(finished: Path, drawn: list[dict[str, Any]]) -> None:
    expected = Counter[str]()
    for number, one in enumerate(drawn[:60]):
        for n, (what, _) in enumerate(KINDS[number % len(KINDS)]):
            if what == "empty_box":
                expected[f"{one['image_id']} box {n}"] += 1
    refused = tables.read_table(str(finished / "out" / "rejects" / "regions"))
    assert set(refused["stage"].to_pylist()) == {"pool"}
    found = {reason: Counter[str]() for reason in ("empty_box", "outside_crop")}
    for r in refused.to_pylist():
        found[r["reason"]][f"{r['image_id']} {r['message'].split(' [')[0].split(' None')[0]}"] += 1
        assert r["uri"].endswith((".jpg", ".png"))
    assert found["empty_box"] == expected
    assert found["outside_crop"] == Counter(["tall box 0", "wide box 1"])
    assert reasons(finished / "out" / "rejects" / "images") == {"broken": "not_an_image"}


def test_the_regions_table_says_what_it_is(finished: Path, drawn: list[dict[str, Any]]) -> None:
    made, images = record(finished, "regions"), record(finished, "images")
    assert made["rows"] == len(region_rows(finished)) == REGIONS
    assert len(made["files"]) == len(images["files"]) > 3
    assert {f["name"] for f in made["files"]} == {f["name"] for f in images["files"]}
    assert made["fingerprint"] == images["fingerprint"]
    assert made["inputs"]["pictures"] == 62
    assert made["figures"] == {"boxes_clipped": 12 + 2}  # every fifth picture; `seen` reaches over an edge of two
    assert made["rejects_by_reason"] == {"empty_box": 4 * 12, "outside_crop": 2}
    assert made["rejects"] == record(finished, "rejects/regions")["rows"] == 4 * 12 + 2
    assert record(finished, "rejects/images")["rows"] == 1
    assert made["provenance"]["features"]["local"] == {"layer": "tokens", "pooling": "rmac", "regions": True}
    assert made["columns"]["local"] == str(tables.vector_type(64))
    found = {report.name: (report.state, report.rows, report.rejected) for report in status(str(finished / "out"))}
    assert found == {"images": ("finished", 62, 1), "regions": ("finished", made["rows"], 50)}


def test_other_tools_read_it(finished: Path) -> None:
    import duckdb

    folder = finished / "out"
    query = f"""select count(*), count(distinct region_id), bool_and(len(r.local) = 64), min(box_xyxy[3] - box_xyxy[1])
        from '{folder}/regions/*.parquet' r join '{folder}/images/*.parquet' i using (image_id)"""
    rows, distinct, wide, narrowest = duckdb.connect().execute(query).fetchall()[0]
    assert rows == distinct == record(finished, "regions")["rows"]
    assert wide
    assert narrowest > 0


def test_the_same_decoded_in_tasks(finished: Path, tiny_model: str, tmp_path: Path) -> None:
    shutil.copy(finished / "m.parquet", tmp_path)
    clipray.run(job(tmp_path, tiny_model, decode_in="tasks", rows_per_block=13))
    assert_same_regions(region_rows(tmp_path), region_rows(finished))
    for name in FEATURES:
        found, expected = (vectors(home / "out" / "images", name) for home in (tmp_path, finished))
        assert found.keys() == expected.keys()
        assert max(np.abs(found[k] - expected[k]).max() for k in expected) <= 1e-6


# --- pictures of all shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Pictures of seven sizes; one of 442 x 405 px whose aspect rounds otherwise when it is decoded at half its size."""
    folder = tmp_path_factory.mktemp("shapes")
    rows = []
    sizes = [(64, 64), (50, 100), (100, 50), (30, 200), (61, 97), (97, 61), (442, 405)]
    for number, (height, width) in enumerate(sizes * 2):
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        waves = np.stack([np.sin(9 * x + number), np.cos(7 * y), np.sin(5 * x * y)], -1)
        path = folder / f"{number:02d}.jpg"
        Image.fromarray(((waves + 1) * 127).astype(np.uint8)).save(path, quality=95)
        box = [[0, 0, width, height], [0.6 * width, 0, width, height / 2]]
        rows.append({"image_id": path.stem, "uri": str(path), "boxes": box if number % 3 else None})
    return rows


@pytest.mark.parametrize("layout", [{"decode_in": "actors"}, {"decode_in": "tasks", "decode": "fast"}])
def test_pictures_keep_their_aspect(
    layout: dict[str, Any], shapes: list[dict[str, Any]], tiny_model: str, tmp_path: Path
) -> None:
    features = {
        "clip": {"layer": "output"},
        "local": {"layer": "block.0", "pooling": "gem", "regions": True, "levels": 3},
    }
    write_manifest(tmp_path / "m.parquet", shapes)
    settings = {"features": features, "preprocess": "keep_aspect", "batch_size": 3, "long_side_px": 96, **layout}
    clipray.run(job(tmp_path, tiny_model, **settings))
    found = {name: vectors(tmp_path / "out" / "images", name) for name in features}
    regions = region_rows(tmp_path)
    assert_complete(tmp_path)
    given = {name: Feature(**feature) for name, feature in features.items()}
    encoder = ImageEncoder(resolve(Model(name=tiny_model)), features=given, precision="fp32", batch_size=1)
    bound = 1e-5 if layout.get("decode") != "fast" else 0.05
    for one in shapes:
        image, image_id = Image.open(one["uri"]), one["image_id"]
        size = keep_aspect_size(image.height, image.width, 96, 16)
        pixels = np.array(image.resize(size[::-1], Image.Resampling.BICUBIC))[None]
        sides = np.array([image.width, image.height] * 2, np.float32)
        boxes = np.array(one["boxes"] or [], np.float32).reshape(-1, 4) / sides * np.array([size[1], size[0]] * 2)
        alone = encoder.encode(pixels, [boxes.astype(np.float32)])
        for name in features:
            assert np.abs(found[name][image_id] - alone.vectors[name][0]).max() <= bound
        mine = [regions[f"{image_id}#g{n}"] for n in range(len(alone.grid))]
        for n, region in enumerate(mine):
            assert np.abs(np.array(region["local"]) - alone.regions[0, n]).max() <= bound
        for n, vector in enumerate(alone.boxes):
            assert np.abs(np.array(regions[f"{image_id}#b{n}"]["local"]) - vector).max() <= bound
        assert len([r for r in regions.values() if r["image_id"] == image_id]) == len(mine) + len(alone.boxes)
        assert alone.cells == (size[0] // 16, size[1] // 16)
        cell = np.array([image.width / alone.cells[1], image.height / alone.cells[0]] * 2)
        expected = alone.grid[:, [2, 1, 4, 3]] * cell  # nothing is cropped: cells divide the whole picture
        np.testing.assert_allclose([r["box_xyxy"] for r in mine], expected, rtol=1e-5)
        np.testing.assert_allclose(np.min(expected, 0)[:2], 0)
        np.testing.assert_allclose(np.max(expected, 0)[2:], sides[:2])


# --- interrupted


def shards(home: Path, table: str) -> list[Path]:
    return sorted((home / "out" / table).glob("*.parquet"))


def ids_of(shard: Path) -> list[str]:
    return pq.read_table(shard, columns=["image_id"])["image_id"].to_pylist()


def encoded_again(home: Path) -> set[str]:
    """The pictures in shards of the second run."""
    return {i for shard in shards(home, "images") if shard.name.startswith("part-0002") for i in ids_of(shard)}


def test_a_finished_run_does_nothing(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_connected", lambda address: pytest.fail("asked for Ray"))
    before = {p: p.stat().st_mtime_ns for p in (mine / "out").rglob("*.parquet")}
    reports = clipray.run(str(mine / "job.yaml"))
    assert [(r.name, r.state, r.rows) for r in reports] == [
        ("images", "finished", 62),
        ("regions", "finished", REGIONS),
    ]
    assert reports[0].note == "was finished already"
    assert {p: p.stat().st_mtime_ns for p in (mine / "out").rglob("*.parquet")} == before


def test_what_a_kill_left_is_mended(mine: Path, finished: Path) -> None:
    """A regions shard lost, one torn, one whose pictures were never written, a picture's rows half there; as after a kill."""
    names = [p.name for p in shards(mine, "images")]
    lost, torn, orphan, half = (mine / "out" / "regions" / name for name in names[:4])
    lost.unlink()
    torn.write_bytes(torn.read_bytes()[:-50])
    again = {i for name in names[:3] for i in ids_of(mine / "out" / "images" / name)}
    (mine / "out" / "images" / orphan.name).unlink()
    regions = Folder(str(half.parent))
    stamp = tables.shard_footer(regions, half.name)[2]
    again.add(ids_of(half)[0])
    fewer = tables.read_shard(regions, half.name).slice(1)
    tables.write_shard(regions, half.name, "regions", fewer, tables.provenance_of(stamp))
    for table in ("images", "regions"):  # as `_start` leaves it
        (mine / "out" / table / "_table.json").unlink()
    (mine / "out" / "regions" / ".tmp-12").write_bytes(b"left aside")
    untouched = {p: p.stat().st_mtime_ns for p in shards(mine, "images")[3:] if p.name != half.name}
    leftovers = sum(p.name in names[:3] for table in ("regions", "rejects/regions") for p in shards(mine, table))

    (report, beside) = clipray.run(str(mine / "job.yaml"))

    assert (report.rows, beside.rows) == (62, REGIONS)
    assert_same_regions(region_rows(mine), region_rows(finished))
    assert_complete(mine)
    (repaired,) = events(mine, "repaired")
    orphaned = ids_of(finished / "out" / "images" / orphan.name)
    assert repaired["rows_without_their_regions"] == len(again) - len(orphaned)
    assert (repaired["torn_files"], repaired["region_files_removed"]) == (1, leftovers - 1)
    assert encoded_again(mine) == again
    assert not list((mine / "out" / "regions").glob(".tmp-*"))
    assert {p: p.stat().st_mtime_ns for p in untouched} == untouched
    before = {p: p.read_bytes() for p in (mine / "out").rglob("*.parquet")}
    assert clipray.run(str(mine / "job.yaml"))[0].note == "was finished already"
    assert {p: p.read_bytes() for p in (mine / "out").rglob("*.parquet")} == before


def test_pictures_that_left_and_boxes_that_changed(mine: Path, finished: Path, drawn: list[dict[str, Any]]) -> None:
    """Their regions go with them; other boxes are other rows, of those pictures only."""
    first = vectors(mine / "out" / "images")
    gone, moved = {drawn[0]["image_id"], drawn[7]["image_id"], "tall"}, {drawn[2]["image_id"], drawn[11]["image_id"]}
    rows = [dict(r) for r in drawn if r["image_id"] not in gone]
    for r in rows:
        if r["image_id"] in moved:
            r["boxes"] = [[1.0, 2.0, 30.0, 40.0]]
    write_manifest(mine / "m.parquet", rows)
    (report, _) = clipray.run(str(mine / "job.yaml"))
    assert report.rows == 59
    assert_complete(mine)
    assert encoded_again(mine) == moved
    found, before = region_rows(mine), region_rows(finished)
    assert not {r["image_id"] for r in found.values()} & gone
    stayed = {key: r for key, r in before.items() if r["image_id"] not in gone | moved}
    assert_same_regions({key: found[key] for key in stayed}, stayed)
    for image_id in moved:
        mine_now = [key for key, r in found.items() if r["image_id"] == image_id]
        assert mine_now == [*(f"{image_id}#g{n}" for n in range(5)), f"{image_id}#b0"]
        assert found[f"{image_id}#b0"]["box_xyxy"] == [1, 2, 30, 40]
    now = vectors(mine / "out" / "images")
    assert all((now[k] == first[k]).all() for k in now.keys() - moved)
    refused = tables.read_table(str(mine / "out" / "rejects" / "regions"))["image_id"].to_pylist()
    assert not set(refused) & gone
    assert (
        record(mine, "regions")["figures"]["boxes_clipped"] == 12 + 2 - 3
    )  # of `tall`, another that is gone and a moved one


def test_fresh_deletes_both(mine: Path, tiny_model: str) -> None:
    """A stale regions table is made anew with its pictures, whichever of the two is named."""
    changed = job(mine, tiny_model, features={"local": {**FEATURES["local"], "levels": 1}})
    (planned,), _ = clipray.plan(changed)
    assert "features.local.levels was 2, is 1" in planned.note
    reports = clipray.run(changed, fresh=["regions"])
    assert [r.name for r in reports] == ["images", "regions"]
    assert {r["scale"] for r in region_rows(mine).values()} == {1, None}
    assert_complete(mine)


def test_a_regions_table_of_another_step_is_left_alone(mine: Path, tiny_model: str) -> None:
    """A second job in the same output must not take the first one's regions for leftovers."""
    before = {p: p.read_bytes() for p in (mine / "out" / "regions").iterdir()}
    second = job(
        mine, tiny_model, name="others", features={"conv": {"layer": "conv1", "pooling": "mac", "regions": True}}
    )
    with pytest.raises(
        StaleTableError, match=r"\S+/regions/part-0001\S+ is of another step, choose another `regions_name`"
    ):
        clipray.run(second)
    assert {p: p.read_bytes() for p in (mine / "out" / "regions").iterdir()} == before
    (planned,), _ = clipray.plan(second)
    assert planned.note.endswith("is of another step, choose another `regions_name`")
    assert clipray.run(str(job(mine, tiny_model)))[0].note == "was finished already"


# --- killed
