"""Features of one pass: every vector is what taps and pooling by hand give, however pictures and boxes are batched."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import yaml

import clipray
from clipray import cli
from clipray.errors import ModelError
from clipray.job import Feature, Model
from clipray.models import pooling
from clipray.models.features import FeatureNetwork, Features, joined
from clipray.models.image_encoder import ImageEncoder
from clipray.models.layers import Taps
from clipray.models.resolve import resolve
from clipray.runner import run

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 64, "layers": 2, "width": 48, "patch_size": 16, "head_width": 16},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
    "vit14": {"image_size": 60, "layers": 2, "width": 48, "patch_size": 14, "head_width": 16},  # 4 px are never read
}
MAPS = {"vit": ["conv1", "block.0", "tokens"], "resnet": ["conv1", "stem", "layer3"]}
BOXES = [[[0, 0, 64, 64], [10, 20, 40, 60.5]], [], [[32, 0, 64, 16]]]
"""For three pictures, x1, y1, x2, y2 in px of the input."""


def make(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        visual = open_clip.CLIP(embed_dim=32, vision_cfg=VISION[kind], text_cfg=TEXT).visual
    return visual.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def towers() -> dict[str, Any]:
    return {kind: make(kind) for kind in VISION}


def batch(count: int = 3, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(height + width))


def given() -> tuple[torch.Tensor, torch.Tensor]:
    """`BOXES` as the network takes them: (K, 4), and (K,) the picture of each."""
    return (
        torch.tensor([box for boxes in BOXES for box in boxes], dtype=torch.float32),
        torch.tensor([n for n, boxes in enumerate(BOXES) for _ in boxes]),
    )


def unit(x: np.ndarray, axis: int = -1) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=axis, keepdims=True), 1e-12)


def squares(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """The two coarsest scales on a square map: the whole, then four squares of side floor(2w / 3) in the corners."""
    assert height == width
    side = 2 * width // 3
    near, far = 0, width - side
    corners = [(top, left, top + side, left + side) for top in (near, far) for left in (near, far)]
    return [(0, 0, height, width), *dict.fromkeys(corners if side else [])]


def by_hand(x: torch.Tensor, feature: Feature, normalize: bool) -> np.ndarray:
    """A map (b, c, h, w) -> (b, c), in NumPy and float64."""
    cells = x.float().numpy().astype(np.float64)
    cells = unit(cells, 1) if feature.l2_before else cells
    flat = cells.reshape(*cells.shape[:2], -1)
    if feature.pooling == "rmac":
        parts = [cells[:, :, y:b, x:r].max((2, 3)) for y, x, b, r in squares(*cells.shape[2:])]
        vectors = sum(unit(part) for part in parts)
    else:
        vectors = {
            "mac": flat.max(2), "spoc": flat.mean(2), "gem": (flat.clip(1e-6) ** feature.p).mean(2) ** (1 / feature.p),
        }[str(feature.pooling)]  # fmt: skip
    after = normalize if feature.l2_after is None else feature.l2_after
    return unit(vectors) if after else vectors


# --- each feature, by hand


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("l2_after", [None, True, False])
@pytest.mark.parametrize("l2_before", [True, False])
@pytest.mark.parametrize("kind", MAPS)
def test_features_are_taps_and_pooling(
    towers: dict[str, Any], kind: str, l2_before: bool, l2_after: bool | None, normalize: bool
) -> None:
    """All poolings on three layers in one network: several features share a layer, and none disturbs another."""
    switches = {"l2_before": l2_before, "l2_after": l2_after}
    features = {
        f"{layer}-{pool}": Feature(layer=layer, pooling=pool, p=2.5, **switches)
        for layer in MAPS[kind]
        for pool in ("mac", "spoc", "gem", "rmac")
    }
    maps = Taps(towers[kind], MAPS[kind])(batch())
    found = FeatureNetwork(towers[kind], features, normalize)(batch())
    assert list(found.vectors) == list(features)
    assert (found.cells, found.grid, found.regions, found.boxes) == (None,) * 4
    for name, feature in features.items():
        vectors = found.vectors[name]
        assert vectors.dtype == torch.float32
        expected = by_hand(maps[feature.layer], feature, normalize)
        np.testing.assert_allclose(vectors.numpy(), expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_each_feature_has_its_own_switches(towers: dict[str, Any]) -> None:
    """Two features on one layer, one with normalised cells and one without: the map is not changed under the other."""
    features = {
        "plain": Feature(layer="block.0", pooling="mac", l2_before=False, l2_after=False),
        "both": Feature(layer="block.0", pooling="mac"),
        "again": Feature(layer="block.0", pooling="mac", l2_before=False, l2_after=False),
        "clip": Feature(),
        "fine": Feature(layer="block.0", pooling="rmac", levels=3),
    }
    x = Taps(towers["vit"], ["block.0"])(batch())["block.0"]
    found = FeatureNetwork(towers["vit"], features, True)(batch()).vectors
    torch.testing.assert_close(found["plain"], x.amax((2, 3)))
    assert torch.equal(found["plain"], found["again"])
    np.testing.assert_allclose(found["both"].numpy(), by_hand(x, features["both"], True), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["clip"], F.normalize(towers["vit"](batch()), dim=-1))
    fine = pooling.pool_regions(F.normalize(x, dim=1), pooling.region_grid(*x.shape[2:], 3))
    torch.testing.assert_close(found["fine"], F.normalize(pooling.rmac_from_regions(fine), dim=-1))


@pytest.mark.parametrize(
    ("normalize", "l2_after", "length_is_one"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
)
def test_output_is_normalised_as_any_other(
    towers: dict[str, Any], normalize: bool, l2_after: bool | None, length_is_one: bool
) -> None:
    expected = towers["vit"](batch())
    found = FeatureNetwork(towers["vit"], {"clip": Feature(l2_after=l2_after)}, normalize)(batch()).vectors["clip"]
    torch.testing.assert_close(found, F.normalize(expected, dim=-1) if length_is_one else expected)


def test_features_of_a_half_precision_network_are_float32(towers: dict[str, Any]) -> None:
    features = {"clip": Feature(), "conv": Feature(layer="stem", pooling="rmac", regions=True)}
    network = FeatureNetwork(make("resnet"), features, True)
    exact = network(batch(), *given())
    found = network.to(torch.bfloat16)(batch().to(torch.bfloat16), *given())
    for one, other in zip(everything(exact), everything(found), strict=True):
        assert other.dtype == torch.float32
        assert F.cosine_similarity(one, other, dim=-1).min() > 0.99


def everything(found: Features[Any]) -> list[Any]:
    return [*found.vectors.values(), *(part for part in (found.regions, found.boxes) if part is not None)]


# --- what does not run


@pytest.mark.parametrize(
    ("kind", "features", "silent"),
    [
        ("vit", {"conv": Feature(layer="conv1", pooling="mac")}, ["ln_pre", "transformer", "ln_post"]),
        ("vit", {"conv": Feature(layer="conv1", pooling="rmac", regions=True)}, ["ln_pre", "transformer", "ln_post"]),
        ("resnet", {"conv": Feature(layer="conv1", pooling="spoc")}, ["bn1", "conv2", "layer1", "attnpool"]),
        ("resnet", {"stem": Feature(layer="stem", pooling="mac")}, ["avgpool", "layer1", "attnpool"]),
    ],
)
def test_the_rest_of_the_network_never_runs(kind: str, features: dict[str, Feature], silent: list[str]) -> None:
    tower = make(kind)
    for name in silent:
        tower.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: pytest.fail(f"{name} ran"))
    FeatureNetwork(tower, features, True)(batch(), *given())


def test_all_features_cost_one_pass(towers: dict[str, Any]) -> None:
    tower, ran = make("vit"), []
    for name in ("conv1", "transformer.resblocks.0", "transformer.resblocks.1", "ln_post"):
        tower.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    features = {
        "clip": Feature(),
        "mac": Feature(layer="conv1", pooling="mac"),
        "rmac": Feature(layer="conv1", pooling="rmac"),
        "tokens": Feature(layer="tokens", pooling="rmac", regions=True),
    }
    FeatureNetwork(tower, features, True)(batch(), *given())
    assert ran == ["conv1", "transformer.resblocks.0", "transformer.resblocks.1", "ln_post"]


def test_a_layer_that_is_not_there(towers: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"no layer 'stem' in this ViT; it has conv1, block.0..1, tokens, output"):
        FeatureNetwork(towers["vit"], {"stem": Feature(layer="stem", pooling="mac")}, True)


# --- regions and boxes


@pytest.mark.parametrize("l2_after", [None, False])
@pytest.mark.parametrize("pool", ["mac", "spoc", "gem", "rmac"])
@pytest.mark.parametrize("kind", MAPS)
def test_regions_are_those_of_the_grid_and_boxes_those_given(
    towers: dict[str, Any], kind: str, pool: str, l2_after: bool | None
) -> None:
    layer = MAPS[kind][-1]
    feature = Feature(layer=layer, pooling=pool, l2_after=l2_after, regions=True)
    found = FeatureNetwork(towers[kind], {"clip": Feature(), "local": feature}, True)(batch(), *given())
    x = F.normalize(Taps(towers[kind], [layer])(batch())[layer], dim=1)
    assert (found.cells, found.covered_px) == ((4, 4), (64, 64))
    assert found.grid is not None
    assert [tuple(row[1:]) for row in found.grid.tolist()] == squares(4, 4)
    plain = {"rmac": "mac"}.get(pool, pool)
    of_cells = Feature(layer=layer, pooling=plain, l2_before=False, l2_after=l2_after)
    for n, (top, left, bottom, right) in enumerate(squares(4, 4)):
        expected = by_hand(x[:, :, top:bottom, left:right], of_cells, True)
        np.testing.assert_allclose(found.regions[:, n].numpy(), expected, rtol=1e-4, atol=1e-6)
    boxes, owner = given()
    raw = pooling.pool_boxes(x, boxes / 16, owner, plain)  # 16 px a cell
    torch.testing.assert_close(found.boxes, raw if l2_after is False else F.normalize(raw, dim=-1))
    if pool == "rmac":  # its own regions are the rows
        unscaled = F.normalize(found.regions, dim=-1).sum(1)
        torch.testing.assert_close(
            found.vectors["local"], unscaled if l2_after is False else F.normalize(unscaled, dim=-1)
        )


def test_levels_and_overlap_are_the_grids_own(towers: dict[str, Any]) -> None:
    feature = Feature(layer="stem", pooling="mac", levels=3, overlap=0.7, regions="grid")
    found = FeatureNetwork(towers["resnet"], {"f": feature}, True)(batch(2, 64, 96), *given())
    assert found.cells == (32, 48)
    assert np.array_equal(found.grid, pooling.region_grid(32, 48, 3, 0.7))
    assert not np.array_equal(found.grid, pooling.region_grid(32, 48, 3, 0.4))
    assert found.regions.shape == (2, len(found.grid), 16)
    assert found.boxes is None  # the grid only, though boxes were given


def test_boxes_alone(towers: dict[str, Any]) -> None:
    network = FeatureNetwork(towers["vit"], {"f": Feature(layer="conv1", pooling="rmac", regions="boxes")}, True)
    found = network(batch(), *given())
    assert (found.regions, found.boxes.shape) == (None, (3, 48))
    none = network(batch(), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert none.boxes.shape == (0, 48)
    assert torch.equal(none.vectors["f"], found.vectors["f"])
    assert network(batch()).boxes is None


def test_boxes_of_a_wide_picture(towers: dict[str, Any]) -> None:
    network = FeatureNetwork(towers["resnet"], {"f": Feature(layer="stem", pooling="spoc", regions="boxes")}, False)
    boxes, owner = torch.tensor([[0.0, 8.0, 96.0, 40.0], [60.0, 0.0, 96.0, 20.0]]), torch.tensor([1, 0])
    found = network(batch(2, 64, 96), boxes, owner)
    x = F.normalize(Taps(towers["resnet"], ["stem"])(batch(2, 64, 96))["stem"], dim=1)
    assert (found.cells, found.covered_px) == ((32, 48), (64, 96))
    torch.testing.assert_close(found.boxes, pooling.pool_boxes(x, boxes / 2, owner, "spoc"))


def test_a_rest_that_patches_do_not_read_has_no_cells(towers: dict[str, Any]) -> None:
    """60 px in patches of 14: four cells over 56 px, so that 28 px are two cells."""
    network = FeatureNetwork(towers["vit14"], {"f": Feature(layer="conv1", pooling="mac", regions=True)}, True)
    pictures = batch(1, 60, 60)
    found = network(pictures, torch.tensor([[0.0, 0.0, 28.0, 56.0], [55.0, 0.0, 60.0, 60.0]]), torch.tensor([0, 0]))
    assert (found.cells, found.covered_px) == ((4, 4), (56, 56))
    x = F.normalize(towers["vit14"].conv1(pictures), dim=1)
    half = pooling.pool_boxes(x, torch.tensor([[0.0, 0.0, 2.0, 4.0]]), torch.tensor([0]))
    torch.testing.assert_close(found.boxes[:1], F.normalize(half, dim=-1))
    assert found.boxes[1].norm() == pytest.approx(1)  # a box on the rest: the cell beside it


# --- batches


def test_batches_of_different_sizes_join_to_one(towers: dict[str, Any]) -> None:
    features = {"clip": Feature(), "conv": Feature(layer="block.1", pooling="gem", regions=True)}
    network = FeatureNetwork(towers["vit"], features, True)
    pictures, (boxes, owner) = batch(7), (torch.rand(9, 4) * 30 + torch.tensor([0, 0, 32, 32]), torch.arange(9) % 7)
    owner = owner.sort().values
    whole = joined([network(pictures, boxes, owner)])
    parts = []
    for first, last in [(0, 3), (3, 4), (4, 7)]:
        mine = (owner >= first) & (owner < last)
        parts.append(network(pictures[first:last], boxes[mine], owner[mine] - first))
    found = joined(parts)
    assert (found.cells, found.covered_px) == (whole.cells, whole.covered_px) == ((4, 4), (64, 64))
    assert np.array_equal(found.grid, whole.grid)
    assert list(found.vectors) == list(whole.vectors)
    for one, other in zip(everything(found), everything(whole), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_what_no_feature_has_stays_none(towers: dict[str, Any]) -> None:
    network = FeatureNetwork(towers["vit"], {"clip": Feature()}, True)
    found = joined([network(batch(2)), network(batch(1))])
    assert (found.cells, found.covered_px, found.grid, found.regions, found.boxes) == (None,) * 5
    assert found.vectors["clip"].shape == (3, 32)


# --- the encoder


FEATURES = {
    "clip": Feature(),
    "mac": Feature(layer="conv1", pooling="mac"),
    "local": Feature(layer="tokens", pooling="rmac", regions=True),
}


def encoder(folder: Path, batch_size: int) -> ImageEncoder:
    model = resolve(Model(name=f"local-dir:{folder}"))
    return ImageEncoder(model, features=FEATURES, precision="fp32", batch_size=batch_size)


def work(count: int, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Pixels, and 0 to 3 boxes for each picture."""
    rng = np.random.default_rng(seed)
    corners = [rng.uniform(0, 30, (rng.integers(0, 4), 2)) for _ in range(count)]
    boxes = [np.concatenate([c, c + rng.uniform(2, 34, c.shape)], 1).astype(np.float32) for c in corners]
    return rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8), boxes


def assert_same(found: Features[np.ndarray], expected: Features[np.ndarray]) -> None:
    assert np.array_equal(found.grid, expected.grid)
    for one, other in zip(everything(found), everything(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, np.float32)
        assert np.abs(one - other).max() <= 1e-6


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_size_of_batches_does_not_matter(saved_models: dict[str, Path], batch_size: int) -> None:
    pixels, boxes = work(11)
    expected = encoder(saved_models["vit"], 64).encode(pixels, boxes)
    assert expected.boxes.shape == (sum(map(len, boxes)), 64)
    assert 0 in map(len, boxes)  # some without
    assert_same(encoder(saved_models["vit"], batch_size).encode(pixels, boxes), expected)


def test_each_box_is_pooled_from_its_own_picture(saved_models: dict[str, Path]) -> None:
    pixels, boxes = work(7, seed=1)
    ours = encoder(saved_models["vit"], 4)
    found = ours.encode(pixels, boxes)
    alone = [ours.encode(pixels[n : n + 1], boxes[n : n + 1]) for n in range(7)]
    np.testing.assert_allclose(found.boxes, np.concatenate([one.boxes for one in alone]), atol=1e-6)
    np.testing.assert_allclose(found.regions, np.concatenate([one.regions for one in alone]), atol=1e-6)


def test_no_picture_of_a_batch_has_boxes(saved_models: dict[str, Path]) -> None:
    pixels, _ = work(3)
    none = [np.zeros((0, 4), np.float32)] * 3
    found = encoder(saved_models["vit"], 2).encode(pixels, none)
    assert found.boxes.shape == (0, 64)
    assert encoder(saved_models["vit"], 2).encode(pixels).boxes is None


def _memory_for(encoder: ImageEncoder, rows: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """From now on batches above `rows` run out of memory. Returns (pictures, lists of boxes) of what was tried."""
    real, tried = encoder._forward, []

    def forward(network: Any, pixels: np.ndarray, precision: str, boxes: Sequence[np.ndarray]) -> Any:
        tried.append((len(pixels), len(boxes)))
        found = real(network, pixels, precision, boxes)
        if len(pixels) > rows:  # only after the work, as a GPU may
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(encoder, "_forward", forward)
    return tried


def test_out_of_memory_keeps_pictures_and_boxes_together(
    saved_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, boxes = work(13, seed=2)
    expected = encoder(saved_models["vit"], 64).encode(pixels, boxes)
    small = encoder(saved_models["vit"], 8)
    tried = _memory_for(small, 3, monkeypatch)
    assert_same(small.encode(pixels, boxes), expected)
    assert tried == [(n, n) for n in (8, 4, 2, 2, 2, 2, 2, 2, 1)]
    assert small.batch_size == small.facts["batch_size"] == 2


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_batches_in_several_threads_do_not_meet(towers: dict[str, Any], kind: str) -> None:
    """On a CPU each core has batches of its own in one network, whose layers are listened to."""
    network = FeatureNetwork(towers[kind], {m: Feature(layer=m, pooling="mac") for m in MAPS[kind]}, normalize=True)
    batches = [torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(60)]

    def vectors(x: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            return network(x).vectors

    expected = [vectors(x) for x in batches]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(vectors, batches))
    for one, other in zip(found, expected, strict=True):
        for name in MAPS[kind]:
            assert (one[name] - other[name]).abs().max() <= 1e-5


def test_every_feature_is_proved(saved_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The precision's check is of the worst feature, and names it."""
    real = ImageEncoder._forward

    def forward(self: ImageEncoder, network: Any, pixels: Any, precision: str, boxes: Any = None) -> Any:
        found = real(self, network, pixels, precision, boxes)
        if precision == "bf16":
            found.vectors["mac"] = -found.vectors["mac"]
        return found

    monkeypatch.setattr(ImageEncoder, "_forward", forward)
    model = resolve(Model(name=f"local-dir:{saved_models['vit']}"))
    with pytest.raises(ModelError, match=r"precision bf16: cosine to fp32 on the test image is -\S+ for 'mac'"):
        ImageEncoder(model, features=FEATURES, precision="bf16", batch_size=4)


# --- what a job asks of a network or a manifest that cannot give it


KINDS = {
    "no-boxes": {},
    "text": {"boxes": pa.array(["0 0 1 1"])},
    "flat": {"boxes": pa.array([[0.0, 0.0, 1.0, 1.0]])},
    "words": {"boxes": pa.array([[["a", "b", "c", "d"]]])},
    "good": {"boxes": pa.array([[[0.0, 0.0, 1.0, 1.0]]])},
    "texts": {"boxes": pa.array([["0 0 1 1"]])},
}
CONV = {"layer": "conv1", "pooling": "mac"}
LISTED = "it has conv1, block.0..1, tokens, output"
WANTED = "expected list<list<float>>: for each image a list of [x1, y1, x2, y2] in px"


@pytest.mark.parametrize(
    ("kind", "manifest", "settings", "message"),
    [
        ("vit", "no-boxes", {"features": {"f": {**CONV, "layer": "stem"}}}, f"no layer 'stem' in this ViT; {LISTED}"),
        ("vit", "no-boxes", {"features": {"f": {**CONV, "layer": "block.2"}}}, f"no layer 'block.2' in this ViT; {LISTED}"),
        ("vit", "no-boxes", {"features": {"f": {**CONV, "layer": "token"}}}, f"no layer 'token' in this ViT; nearest: tokens; {LISTED}"),
        ("resnet", "no-boxes", {"features": {"f": {**CONV, "layer": "tokens"}}}, "no layer 'tokens' in this ResNet; it has conv1, stem, layer1..4, output"),
        ("vit", "no-boxes", {"features": {"f": {**CONV, "regions": "boxes"}}}, "{home}/no-boxes.parquet: `regions: boxes` needs a column `boxes`; found: image_id, uri"),
        ("vit", "text", {"features": {"f": {**CONV, "regions": "boxes"}}}, f"{{home}}/text.parquet: column `boxes` is string; {WANTED}"),
        ("vit", "flat", {"features": {"f": {**CONV, "regions": True}}}, f"{{home}}/flat.parquet: column `boxes` is list<element: double>; {WANTED}"),
        ("vit", "words", {"features": {"f": {**CONV, "regions": True}}}, f"{{home}}/words.parquet: column `boxes` is list<element: list<element: string>>; {WANTED}"),
        ("vit", "good no-boxes", {"features": {"f": {**CONV, "regions": True}}}, "{home}/no-boxes.parquet: column 'boxes' is missing, but list<element: list<element: double>> in {home}/good.parquet"),
        ("vit", "no-boxes good", {"features": {"f": {**CONV, "regions": True}}}, "{home}/good.parquet: column 'boxes' is list<element: list<element: double>>, but missing in {home}/no-boxes.parquet"),
        ("vit", "good texts", {"features": {"f": {**CONV, "regions": "boxes"}}}, "{home}/texts.parquet: column 'boxes' is list<element: string>, but list<element: list<element: double>> in {home}/good.parquet"),
        ("resnet", "no-boxes", {"preprocess": "keep_aspect"}, "preprocess: keep_aspect: this ResNet cannot take images of 64 x 128 px (h x w): `output` is pooled with positions for 2 x 2 cells; drop `keep_aspect`, or take other layers"),
    ],
)  # fmt: skip
def test_a_job_that_cannot_be_is_one_line_before_any_work(
    saved_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    kind: str, manifest: str, settings: dict[str, Any], message: str,
) -> None:  # fmt: skip
    for name, columns in KINDS.items():
        table = pa.table({"image_id": [name], "uri": ["a.png"], **columns})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    step = {"manifest": [str(tmp_path / f"{name}.parquet") for name in manifest.split()], **settings}
    job = {"output": str(tmp_path / "out"), "model": {"name": f"local-dir:{saved_models[kind]}"}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**job, "steps": [{"embed_images": step}]}))
    monkeypatch.setattr(run, "_connected", lambda *_: contextlib.nullcontext())  # Ray starts meanwhile
    for verb in ("plan", "run"):
        monkeypatch.setattr(sys, "argv", ["clipray", verb, str(tmp_path / "job.yaml")])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        assert capfd.readouterr() == ("", f"clipray: {message.format(home=tmp_path)}\n")
    assert not (tmp_path / "out" / "images").exists()


@pytest.mark.parametrize("manifest", ["text", "good no-boxes"])
def test_boxes_that_nothing_uses_may_be_anything(saved_models: dict[str, Path], tmp_path: Path, manifest: str) -> None:
    for name, columns in KINDS.items():
        pq.write_table(pa.table({"image_id": [name], "uri": ["a.png"], **columns}), tmp_path / f"{name}.parquet")
    step = {"manifest": [str(tmp_path / f"{name}.parquet") for name in manifest.split()]}
    job = {"output": str(tmp_path / "out"), "model": {"name": f"local-dir:{saved_models['vit']}"}}
    for features in ({"f": {**CONV, "regions": "grid"}}, {"f": CONV}):
        (tmp_path / "job.yaml").write_text(
            yaml.safe_dump({**job, "steps": [{"embed_images": {**step, "features": features}}]})
        )
        (planned,), lines = clipray.plan(str(tmp_path / "job.yaml"))
        assert (planned.state, planned.total) == ("absent", len(manifest.split()))
        assert lines[-1].endswith("vectors of 64 (f)")
