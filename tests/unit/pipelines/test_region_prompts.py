"""Boxes in each prompt: as open_clip gives them for the pictures that the prompts mean."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from clipray import tables
from clipray.analysis.referring import others, refer
from clipray.demo.scenes import draw, sample_scene
from clipray.inputs.vector_column import open_vectors
from clipray.job import Column, EmbedRegions, Model
from clipray.models.foveal import FovealTower
from clipray.models.resolve import resolve
from clipray.pipelines.region import RegionBlockEncoder
from clipray.pipelines.spec import Limits, RegionSpec
from clipray.steps.labels.caption_draw import Draw, draw_of_file
from clipray.storage.folder import Folder

HEIGHT, WIDTH = 96, 160


@pytest.fixture(scope="module")
def block() -> pa.Table:
    """Wide pictures with some boxes in the middle, which the network sees, one at the left edge; one picture is none."""
    rows = []
    for n in range(6):
        scene = draw(sample_scene(9, n, kind="group"), HEIGHT)
        canvas = np.full((HEIGHT, WIDTH, 3), 120, np.uint8)
        canvas[:, 32:128] = scene.pixels
        file = io.BytesIO()
        Image.fromarray(canvas).save(file, "PNG")
        boxes = [*(scene.boxes + np.array([32, 0, 32, 0])).tolist(), [0.5, 10.0, 20.25, 90.0]]
        rows.append({"image_id": str(n), "bytes": file.getvalue(), "boxes": boxes if n != 4 else []})
    rows.append({"image_id": "bad", "bytes": b"no picture", "boxes": [[0.0, 0.0, 4.0, 4.0]]})
    schema = pa.schema({"image_id": pa.string(), "bytes": pa.binary(), "boxes": pa.list_(pa.list_(pa.float64()))})
    return pa.Table.from_pylist(rows, schema)


@pytest.fixture(scope="module")
def upstream() -> tuple[Any, Any]:
    model = resolve(Model(name="demo"))
    open_clip.add_model_config(model.config)
    network, _, preprocess = open_clip.create_model_and_transforms("demo", pretrained=model.pretrained)
    return network.eval(), preprocess


def shown(image: Image.Image, box: list[float], how: EmbedRegions) -> Image.Image:
    """What a prompt shows of a picture, by Pillow alone."""
    x1, y1, x2, y2 = box
    whole = (int(np.floor(x1)), int(np.floor(y1)), int(np.ceil(x2)), int(np.ceil(y2)))
    if how.prompt == "crop":
        return image.crop(whole)
    if how.prompt == "blur":
        mask = Image.new("L", image.size)
        mask.paste(255, whole)
        return Image.composite(image, image.filter(ImageFilter.GaussianBlur(how.blur.radius * HEIGHT)), mask)
    if how.prompt == "circle":
        image = image.copy()
        ImageDraw.Draw(image).ellipse([x1, y1, x2 - 1, y2 - 1], outline=how.circle.colour, width=5)
    return image


PROMPTS: list[dict[str, Any]] = [
    {"prompt": "crop"},
    {"prompt": "blur", "blur": {"radius": 0.1}},
    {"prompt": "circle", "circle": {"colour": "lime", "width": 0.05}},
    {"prompt": "none"},
]


@pytest.mark.parametrize("given", PROMPTS, ids=lambda given: str(given["prompt"]))
@pytest.mark.parametrize("preprocess", ["model", "squash"])
def test_vectors_are_those_of_what_a_prompt_shows(
    block: pa.Table, upstream: Any, given: dict[str, Any], preprocess: Any
) -> None:
    how = EmbedRegions(name="regions", manifest="", preprocess=preprocess, **given)
    made = RegionBlockEncoder(settings_for(how, block), lambda _: None)(block)
    network, transform = upstream
    assert made["reason"].to_pylist() == [None] * 6 + ["not_an_image"]
    for row, source in zip(made.to_pylist()[:6], block.to_pylist(), strict=False):
        image = Image.open(io.BytesIO(source["bytes"])).convert("RGB")
        seen = source["boxes"] if preprocess == "squash" or how.prompt == "crop" else source["boxes"][:-1]
        assert [r["region_id"] for r in row["regions"]] == [f"{row['image_id']}#b{n}" for n in range(len(seen))]
        assert len(row["rejected_boxes"]) == len(source["boxes"]) - len(seen)
        views = [shown(image, box, how) for box in seen]
        if preprocess == "squash":
            views = [view.resize((64, 64), Image.Resampling.BICUBIC) for view in views]
        if views:
            with torch.inference_mode():
                expected = network.encode_image(torch.stack([transform(v) for v in views]), normalize=True).numpy()
            assert np.abs(np.array([r["clip"] for r in row["regions"]]) - expected).max() <= 1e-5


def png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_a_box_too_thin_to_be_scaled_is_refused_alone(block: pa.Table) -> None:
    rows = [{"image_id": "a", "bytes": png(900, 9), "boxes": [[0, 0, 9, 90], [4, 0, 5, 900], [0, 0, 9, 900]]}]
    how = EmbedRegions(name="regions", manifest="", prompt="crop")
    blocks = RegionBlockEncoder(settings_for(how, block, max_pixels=1_000_000), lambda _: None)  # 64 px: 64 x 57,600
    (row,) = blocks(pa.Table.from_pylist(rows, block.schema)).to_pylist()
    assert row["reason"] is None
    assert [region["region_id"] for region in row["regions"]] == ["a#b0", "a#b2"]
    ((box, reason, message),) = (tuple(refused.values()) for refused in row["rejected_boxes"])
    assert (box, reason) == ("a#b1", "too_many_pixels")
    assert "900 x 1 px" in message
    assert "57600 x 64 px" in message


@pytest.mark.parametrize("prompt", ["blur", "circle", "none"])
def test_an_image_too_thin_to_be_scaled_is_refused(block: pa.Table, prompt: Any) -> None:
    rows = [{"image_id": "a", "bytes": png(900, 1), "boxes": [[0.0, 440.0, 1.0, 460.0]]}]
    how = EmbedRegions(name="regions", manifest="", prompt=prompt)
    made = RegionBlockEncoder(settings_for(how, block, max_pixels=1_000_000), lambda _: None)(
        pa.Table.from_pylist(rows, block.schema)
    )
    assert made["reason"].to_pylist() == ["too_many_pixels"]
    assert "57600 x 64 px" in made["message"][0].as_py()


def settings_for(how: EmbedRegions, block: pa.Table, max_pixels: int = Limits.max_pixels) -> RegionSpec:
    return RegionSpec(
        model=resolve(Model(name="demo")),
        limits=Limits(max_pixels=max_pixels),
        features={},
        schema=tables.arrow_schema("region_pictures", extra=[block.schema.field("boxes")]),
        region_schema=tables.arrow_schema("regions", {"clip": 128}),
        precision="fp32",
        batch_size=8,
        how=how,
    )


def test_scores_are_without_what_a_box_has_with_any_caption() -> None:
    similarity = np.array([[0.9, 0.8, 0.7], [0.3, 0.1, 0.2], [0.5, 0.9, 0.4]])  # the first box fits anything
    found = refer(similarity, others(similarity))
    assert found.scores == pytest.approx(np.array([[0.15, 0, -0.15], [0.15, -0.15, 0], [-0.15, 0.45, -0.3]]), abs=1e-6)
    assert found.best.tolist()[1:] == [2, 1]
    assert found.margin[1:] == pytest.approx([0.45, 0.15], abs=1e-6)
    assert found.rank(2, 1) == 1
    assert found.rank(1, 1) == 3
    assert refer(similarity).best.tolist() == [0, 2, 0]
    alone = refer(similarity[:1], others(similarity[:1]))
    assert (alone.best.tolist(), np.isnan(alone.margin).all()) == ([0, 0, 0], True)
    assert not others(similarity[:, :1]).any()  # a single caption
    assert refer(np.full((3, 2), 0.5)).rank(0, 0) == 3  # a tie counts against it
    with_any = np.array([[0.8], [0.1], [0.3]])
    assert refer(similarity, with_any).scores == pytest.approx(similarity - with_any, abs=1e-6)


def test_falip_sees_the_whole_image_squashed(block: pa.Table, upstream: Any) -> None:
    how = EmbedRegions(manifest="", foveal={"mask": "falip", "alpha": 4, "blocks": 2})
    assert how.preprocess == "squash"
    assert EmbedRegions(manifest="", preprocess="model", foveal=how.foveal).preprocess == "model"
    made = RegionBlockEncoder(settings_for(how, block), lambda _: None)(block)
    network, transform = upstream
    tower = FovealTower(network.visual, how.foveal)
    for row, source in zip(made.to_pylist()[:6], block.to_pylist(), strict=False):
        assert len(row["regions"]) == len(source["boxes"])  # also of the box that a centre crop leaves out
        if not source["boxes"]:
            continue
        image = Image.open(io.BytesIO(source["bytes"])).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
        boxes = torch.tensor([[x1 * 0.4, y1 * 2 / 3, x2 * 0.4, y2 * 2 / 3] for x1, y1, x2, y2 in source["boxes"]])
        with torch.inference_mode():
            expected = tower(transform(image)[None], boxes, torch.zeros(len(boxes), dtype=torch.int64))
        expected = torch.nn.functional.normalize(expected, dim=1).numpy()
        assert np.abs(np.array([r["clip"] for r in row["regions"]]) - expected).max() <= 1e-5


def test_captions_are_drawn_by_the_regions_ids(tmp_path: Path) -> None:
    captions = [f"caption {n}" if n % 5 else [None, "", " "][n % 3] for n in range(1_000)]
    regions = pa.table(
        {"region_id": [f"r{n}" for n in range(1_000)], "caption": captions, "clip": [[1.0, 2.0]] * 1_000}
    )
    for name, rows in (("a", regions), ("b", regions.take(pa.array(range(999, -1, -1))))):
        (tmp_path / name).mkdir()
        pq.write_table(rows, tmp_path / name / "part.parquet", row_group_size=70 if name == "a" else 1_000)

    def draw(name: str, count: int, random_state: int = 0) -> list[Draw]:
        column = Column(path=str(tmp_path / name), column="clip", id="region_id")
        source = open_vectors(column, Folder(str(tmp_path)))
        return draw_of_file((source, list(source.row_groups), count, random_state))

    drawn = draw("a", 200)
    assert len({caption for _, _, caption in drawn}) == 200
    assert all(caption == f"caption {region[1:]}" for _, region, caption in drawn)  # and never an empty one
    assert draw("b", 200) == drawn
    assert draw("a", 50) == drawn[:50]
    assert len(draw("a", 5_000)) == 800
    both = {region for _, region, _ in drawn} & {region for _, region, _ in draw("a", 200, 1)}
    assert 20 < len(both) < 80  # 200 of 800, twice: about 50
    assert 0.4 < np.mean([int(region[1:]) < 500 for _, region, _ in drawn]) < 0.6
