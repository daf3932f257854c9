"""The demo world: determinism, boxes against pixels, shapes against their areas, manifests."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from clipray.demo import prompts
from clipray.demo.painting import Lighting
from clipray.demo.places import draw_view, sample_place, sample_view
from clipray.demo.scenes import contradicting_word, draw, sample_scene, with_word
from clipray.demo.shapes import FIELDS, REACH, coverage
from clipray.demo.world import IMAGES_SCHEMA, LABELLED_SCHEMA, QUERIES_SCHEMA, TEXTS_SCHEMA, DemoWorld, write_world
from tools.demo_scenes import write_contact_sheet

EVEN_LIGHT = Lighting(gain=1.0, slope_x=0.0, slope_y=0.0, warmth=0.0, noise=0.0, blur=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> DemoWorld:
    folder = tmp_path_factory.mktemp("world")
    return write_world(folder, seed=3, n_scenes=20, n_groups=8, n_words=4, n_places=3, side_px=96)


def _plane(reach: float = 1.5, n: int = 600) -> tuple[np.ndarray, np.ndarray, float]:
    steps = ((np.arange(n) + 0.5) / n * 2 - 1).astype(np.float32) * reach
    x, y = np.meshgrid(steps, steps)
    return x, y, n / (2 * reach)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi * 0.88**2),
        ("square", 1.52**2),
        ("triangle", 3 * np.sqrt(3) * 0.5**2),
        ("star", 10 * 0.5 * 0.42 * np.sin(np.pi / 5)),
        ("cross", 2 * 1.84 * 0.6 - 0.6**2),
        ("ring", np.pi * (0.9**2 - 0.46**2)),
    ],
)
def test_shapes_cover_the_area_that_geometry_gives(shape: str, area: float) -> None:
    x, y, pixels_per_unit = _plane()
    covered = coverage(shape, x, y, pixels_per_unit=pixels_per_unit).sum() / pixels_per_unit**2
    assert covered == pytest.approx(area, rel=0.005)


@pytest.mark.parametrize("shape", prompts.SHAPES)
def test_shapes_stay_within_reach_and_fill_some_of_the_unit_circle(shape: str) -> None:
    x, y, pixels_per_unit = _plane()
    covered = coverage(shape, x, y, pixels_per_unit=pixels_per_unit)
    assert covered[np.hypot(x, y) > REACH].max() == 0
    assert 0.2 < covered.sum() / pixels_per_unit**2 / np.pi < 0.9


def test_there_are_64_classes_and_three_prompt_styles() -> None:
    labels = prompts.class_labels()
    assert len(set(labels)) == 64
    assert set(FIELDS) == set(prompts.SHAPES)
    assert prompts.class_prompt("red star", "template") == "a photo of a red star"
    definition = prompts.class_prompt("red star", "definition")
    assert prompts.class_prompt("red star", "name_is_definition") == f"red star is {definition}"
    for style in prompts.PROMPT_STYLES:
        assert len({prompts.class_prompt(label, style) for label in labels}) == 64


@pytest.mark.parametrize("kind", ["single", "group", "word"])
def test_same_seed_same_pixels_whatever_was_drawn_before(kind: str) -> None:
    first = [draw(sample_scene(5, index, kind=kind), 64) for index in range(4)]
    again = [draw(sample_scene(5, index, kind=kind), 64) for index in reversed(range(4))][::-1]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
        np.testing.assert_array_equal(one.boxes, other.boxes)
    assert not np.array_equal(first[0].pixels, draw(sample_scene(6, 0, kind=kind), 64).pixels)
    assert first[0].pixels.shape == (64, 64, 3)
    assert first[0].pixels.dtype == np.uint8


@pytest.mark.parametrize("index", range(12))
def test_boxes_are_where_a_picture_with_a_thing_differs_from_one_without(index: int) -> None:
    kind = "single" if index % 2 else "group"
    scene = replace(sample_scene(8, index, kind=kind), lighting=EVEN_LIGHT, has_post=False)
    for thing in scene.things:
        picture = draw(replace(scene, things=(thing,)), 128)
        empty = draw(replace(scene, things=()), 128)
        change = np.abs(picture.pixels.astype(int) - empty.pixels).max(axis=2)
        changed = change > 0
        left, top, right, bottom = picture.boxes[0].astype(int)
        assert 0 <= left < right <= 128
        assert 0 <= top < bottom <= 128
        outside = np.ones_like(changed)
        outside[top:bottom, left:right] = False  # there, a pixel is covered by less than half
        assert changed.any()
        assert change[outside].max() <= 0.5 * change.max() + 1
        outside[max(top - 4, 0) : bottom + 4, max(left - 4, 0) : right + 4] = False  # thin tips of stars
        assert not (changed & outside).any()
        for edge in (changed[top, left:right], changed[bottom - 1, left:right]):
            assert edge.any()
        for edge in (changed[top:bottom, left], changed[top:bottom, right - 1]):
            assert edge.any()


def test_groups_have_two_to_four_different_things_with_a_caption_each() -> None:
    counts = set()
    for index in range(40):
        scene = sample_scene(2, index, kind="group")
        picture = draw(scene, 64)
        assert len(picture.boxes) == len(picture.box_captions) == len(scene.things)
        assert len({thing.label for thing in scene.things}) == len(scene.things)
        assert all(f"{thing.colour} {thing.shape}" in scene.captions[0] for thing in scene.things)
        counts.add(len(scene.things))
    assert counts == {2, 3, 4}


def test_a_contradicting_word_names_another_colour_and_shape_and_changes_the_picture() -> None:
    for index in range(30):
        scene = sample_scene(4, index)
        colour, shape = contradicting_word(scene).split(" ")
        assert colour not in scene.label
        assert shape not in scene.label
        written = with_word(scene, f"{colour} {shape}")
        assert written.label == scene.label
        assert written.captions == scene.captions
        assert not np.array_equal(draw(written, 64).pixels, draw(scene, 64).pixels)


def test_views_of_a_place_differ_and_repeat() -> None:
    place = sample_place(1, 0)
    views = [sample_view(place, number, relation=kind) for kind in ("easy", "hard", "junk") for number in (0, 1)]
    drawn = [draw_view(place, view, 64) for view in views]
    np.testing.assert_array_equal(drawn[0], draw_view(place, views[0], 64))
    assert len({picture.tobytes() for picture in drawn}) == 6
    assert len({sample_place(1, index).captions for index in range(50)}) == 50


def test_image_manifest_is_valid(world: DemoWorld) -> None:
    table = pq.read_table(world.images)
    assert table.schema.equals(IMAGES_SCHEMA)
    rows = table.to_pylist()
    assert len({row["image_id"] for row in rows}) == len(rows) == world.n_images == 20 + 8 + 4 + 3 * 7
    for row in rows:
        with Image.open(world.images.parent / row["uri"]) as image:
            assert image.size == (96, 96)
            assert image.mode == "RGB"
        assert row["caption"] == row["captions"][0]
        assert (row["boxes"] is None) == (row["box_captions"] is None) == (row["place_id"] is not None)
        for left, top, right, bottom in row["boxes"] or []:
            assert 0 <= left < right <= 96
            assert 0 <= top < bottom <= 96
        assert len(row["boxes"] or []) == len(row["box_captions"] or [])
        assert row["label"] in {*prompts.class_labels(), None}


def test_word_pictures_are_single_pictures_with_a_contradicting_word(world: DemoWorld) -> None:
    rows = {row["image_id"]: row for row in pq.read_table(world.images).to_pylist()}
    for index in range(4):
        word, single = rows[f"word-{index:05d}"], rows[f"single-{index:05d}"]
        assert (word["label"], word["captions"], word["boxes"]) == (
            single["label"],
            single["captions"],
            single["boxes"],
        )
        assert single["word"] is None
        assert not set(word["word"].split(" ")) & set(word["label"].split(" "))


def test_texts_classes_and_queries_refer_to_what_is_there(world: DemoWorld) -> None:
    ids = set(pq.read_table(world.images)["image_id"].to_pylist())
    texts, queries = pq.read_table(world.texts), pq.read_table(world.queries)
    assert texts.schema.equals(TEXTS_SCHEMA)
    assert queries.schema.equals(QUERIES_SCHEMA)
    assert set(texts["image_id"].to_pylist()) == ids
    assert len(set(texts["text_id"].to_pylist())) == texts.num_rows
    assert {*queries["query_id"].to_pylist(), *queries["image_id"].to_pylist()} <= ids
    relations: dict[str, set[str]] = {}
    for row in queries.to_pylist():
        relations.setdefault(row["query_id"], set()).add(row["relation"])
    assert len(relations) == 3
    assert all(found == {"easy", "hard", "junk"} for found in relations.values())
    assert pq.read_table(world.classes).num_rows == 3 * 64
    images = pq.read_table(world.images)
    single = images.filter(pc.equal(images["kind"], "single"))
    assert pq.read_table(world.labelled).equals(single.select(["image_id", "uri", "label"]).cast(LABELLED_SCHEMA))
    pairs = pq.read_table(world.pairs).to_pylist()
    captions = {row["image_id"]: row["captions"] for row in pq.read_table(world.images).to_pylist()}
    assert len({row["pair_id"] for row in pairs}) == len(pairs) == 2 * (20 + 8)
    for row in pairs:
        assert (row["caption"] in captions[row["image_id"]]) == row["fits"]
        assert row["references"] == captions[row["image_id"]][1:]


def test_class_yaml_says_the_same_as_the_class_table(world: DemoWorld) -> None:
    listed = yaml.safe_load(world.classes_yaml.read_text(encoding="utf-8"))
    by_style = {(row["label"], row["style"]): row["prompt"] for row in pq.read_table(world.classes).to_pylist()}
    for name in listed["names"]:
        assert by_style[name, "template"] == listed["templates"].format(name)
        assert by_style[name, "definition"] == listed["descriptions"][name]


def test_writing_twice_gives_the_same_bytes(world: DemoWorld, tmp_path: Path) -> None:
    write_world(tmp_path, seed=3, n_scenes=20, n_groups=8, n_words=4, n_places=3, side_px=96)
    written = sorted(path.relative_to(world.folder) for path in world.folder.rglob("*") if path.is_file())
    assert len(written) == world.n_images + 8
    for path in written:
        assert (tmp_path / path).read_bytes() == (world.folder / path).read_bytes(), path


def test_contact_sheet_is_drawn(tmp_path: Path) -> None:
    path = write_contact_sheet(tmp_path / "docs" / "sheet.jpg", n_columns=3, side_px=48)
    with Image.open(path) as sheet:
        assert sheet.width == 6 + 3 * 54
        assert sheet.height > 8 * 48


def test_scenes_need_no_torch() -> None:
    code = "import sys, clipray.demo.scenes, clipray.demo.world, clipray.demo.tour; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
