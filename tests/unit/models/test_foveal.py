"""Foveal attention: the plain network at alpha 0, FALIP's formula elsewhere, and towers that cannot be steered."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer

from benchmarks.attention_maps import attention_maps
from clipray.demo.scenes import Drawing, draw, sample_scene
from clipray.errors import ClipRayError, ModelError
from clipray.job import Foveal, Model
from clipray.models.foveal import FovealTower, bumps, check, chosen_blocks, falip_bumps, refusal
from clipray.models.image_encoder import ImageEncoder, mean_and_std
from clipray.models.layers import tower_without_weights
from clipray.models.load import load
from clipray.models.resolve import architecture, resolve
from clipray.pipelines.point_cloud import boxes_of_masks

DEPTH = 5


@pytest.fixture(scope="module")
def visual() -> VisionTransformer:
    """A random vision transformer whose attention is no mere average."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = VisionTransformer(
            image_size=32, patch_size=8, width=48, layers=DEPTH, heads=3, mlp_ratio=2, output_dim=24
        )
        for block in made.transformer.resblocks:
            block.attn.in_proj_weight.data.mul_(2)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def demo() -> Any:
    return load(resolve(Model(name="demo"))).visual


@pytest.fixture(scope="module")
def scenes() -> list[Drawing]:
    return [draw(sample_scene(3, n, kind="group"), 64) for n in range(12)]


@pytest.fixture(scope="module")
def given(scenes: list[Drawing]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(b, 3, 64, 64) as the demo model takes it, (K, 4) boxes, (K,) owners."""
    mean, std = mean_and_std(resolve(Model(name="demo")))
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes])).permute(0, 3, 1, 2) / 255
    boxes = torch.from_numpy(np.concatenate([scene.boxes for scene in scenes]))
    owner = torch.repeat_interleave(torch.tensor([len(scene.boxes) for scene in scenes]))
    return (pixels - mean) / std, boxes, owner


def regions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    boxes = torch.tensor([[0, 0, 16, 16], [10, 4, 31, 30], [3, 20, 9, 23], [24, 0, 32, 32]], dtype=torch.float32)
    return torch.randn(3, 3, 32, 32, generator=rng), boxes, torch.tensor([0, 2, 2, 1])


def by_hand(visual: Any, batch: torch.Tensor, boxes: torch.Tensor, foveal: Foveal) -> torch.Tensor:
    """The formula, word for word, by open_clip's own blocks: a whole mask for a whole picture a region."""
    x = visual._embeds(batch)
    side, heads = visual.grid_size[0], visual.transformer.resblocks[0].attn.num_heads
    at = (torch.arange(side) + 0.5) * visual.patch_size[0]
    for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        sx, sy = (max(foveal.sigma * (b - a) / 2, visual.patch_size[0] / 2) for a, b in ((x1, x2), (y1, y2)))
        bump = torch.exp(-(((at[None] - (x1 + x2) / 2) / sx) ** 2 + ((at[:, None] - (y1 + y2) / 2) / sy) ** 2) / 2)
        bump = (bump - bump.min()) / (bump.max() - bump.min())
        mask = torch.zeros(heads, side * side + 1, side * side + 1)
        for head in range(heads) if foveal.heads == "all" else foveal.heads:
            mask[head, 0, 1:] = foveal.alpha * bump.flatten()
        row = x[k : k + 1]
        for number, block in enumerate(visual.transformer.resblocks):
            row = block(row, attn_mask=mask if number in chosen_blocks(foveal.blocks, DEPTH) else None)
        x[k] = row[0]
    return visual.ln_post(x[:, 0]) @ visual.proj


@pytest.mark.parametrize("blocks", [1, 2, 3, "all", [1, 3], [4], [0]], ids=str)
@pytest.mark.parametrize("heads", ["all", [0, 2]], ids=str)
def test_shared_blocks_give_the_vectors_of_whole_masks(visual: Any, blocks: Any, heads: Any) -> None:
    foveal = Foveal(alpha=3.5, sigma=0.8, blocks=blocks, heads=heads)
    batch, boxes, owner = regions()
    found = FovealTower(visual, foveal)(batch, boxes, owner)
    expected = by_hand(visual, batch[owner], boxes, foveal)
    plain = visual(batch)[owner]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - plain).abs().max() > 1e-3 * plain.abs().max()  # and something was done


def falip_mask(box: list[float], side: int, patch: int, sigma: float, v: float) -> torch.Tensor:
    """(n, n): FALIP's mask of one box in px, patch by patch, from its formula."""
    x1, y1, x2, y2 = (max(math.ceil(at / patch), 1) - 1 for at in box)
    weights = {}
    for row in range(y1, y2 + 1):
        for column in range(x1, x2 + 1):
            distance = math.hypot(row - (y1 + y2) / 2, column - (x1 + x2) / 2)
            weights[row, column] = math.exp(-0.5 * (distance / sigma) ** 2)
    low, high = min(weights.values()), max(weights.values())
    mask = torch.zeros(side * side + 1, side * side + 1)
    for (row, column), weight in weights.items():
        mask[0, 1 + row * side + column] = v * (weight - low + 1e-6) / (high - low + 1e-6)
    return mask


@pytest.mark.parametrize("settings", [{}, {"alpha": 3, "sigma": 1.5, "blocks": [1, 3]}], ids=["theirs", "others"])
def test_falip_is_the_authors_mask(settings: dict[str, Any]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        network: Any = VisionTransformer(32, 4, 32, layers=12, heads=2, mlp_ratio=2, output_dim=16)
    network.eval().requires_grad_(False)
    for block in network.transformer.resblocks:
        block.attn.in_proj_weight.mul_(2)
    foveal = Foveal(mask="falip", **settings)
    batch, boxes, owner = regions()
    boxes = torch.cat([boxes, torch.tensor([[5.0, 6, 7, 8], [8, 8, 20, 9]])])  # one patch; from patch to patch
    owner = torch.cat([owner, torch.tensor([0, 1])])
    found = FovealTower(network, foveal)(batch, boxes, owner)
    for k, box in enumerate(boxes.tolist()):
        mask = falip_mask(box, 8, 4, foveal.sigma, foveal.alpha)
        x = network._embeds(batch[owner[k] : owner[k] + 1])
        for number, block in enumerate(network.transformer.resblocks):
            steered = number in settings.get("blocks", (8, 9, 10, 11))
            x = block(x, attn_mask=mask if steered else None)
        expected = network.ln_post(x[:, 0]) @ network.proj
        assert (found[k] - expected[0]).abs().max() <= 1e-5 * expected.abs().max()
    plain, wide = network(batch)[owner], FovealTower(network, Foveal(alpha=foveal.alpha, blocks=4))(batch, boxes, owner)
    for other in (plain, wide):
        assert (found - other).abs().max() > 1e-3 * plain.abs().max()


def test_falip_is_highest_in_the_middle_and_nothing_outside() -> None:
    boxes = torch.tensor([[0.5, 1.5, 3, 4], [1, 1, 3, 3], [0, 0, 0.4, 0.2], [7.5, 7.5, 8, 8.5]])
    found = falip_bumps(boxes, 8, 8, 100.0)
    square = 1 - math.exp(-0.5 * 2 / 1e4)  # a corner of three by three patches, against the middle
    side = (math.exp(-0.5 / 1e4) - math.exp(-0.5 * 2 / 1e4) + 1e-6) / (square + 1e-6)
    corner = 1e-6 / (square + 1e-6)
    by_hand = [[corner, side, corner], [side, 1, side], [corner, side, corner]]
    assert found[0, 1:4, 0:3].tolist() == [pytest.approx(row, rel=1e-5) for row in by_hand]
    assert found[1, 0:3, 0:3].tolist() == [pytest.approx(row, rel=1e-5) for row in by_hand]  # begins at an edge
    assert [bump.count_nonzero().item() for bump in found] == [9, 9, 1, 1]
    assert found[2, 0, 0] == found[3, 7, 7] == 1


@pytest.mark.parametrize("blocks", [1, 2, 3, "all"], ids=str)
def test_alpha_0_is_the_plain_network(visual: Any, demo: Any, given: Any, blocks: Any) -> None:
    foveal = Foveal(alpha=0, blocks=blocks)
    for network, (batch, boxes, owner) in ((visual, regions()), (demo, given)):
        tower, plain = FovealTower(network, foveal), network(batch)[owner]
        assert torch.equal(tower(batch, boxes, owner), plain)
        masked = tower.steered(batch, boxes, owner)  # the same way as with a mask, which is zero
        assert (F.normalize(masked, dim=1) - F.normalize(plain, dim=1)).abs().max() <= 1e-6


def test_attention_in_the_box_grows_with_alpha(demo: Any, given: Any) -> None:
    batch, boxes, owner = given
    at = (torch.arange(8) + 0.5) * 8
    inside = (at > boxes[:, 0:1]) & (at < boxes[:, 2:3]), (at > boxes[:, 1:2]) & (at < boxes[:, 3:4])
    within = inside[1][:, :, None] & inside[0][:, None]  # (K, 8, 8): patches whose centre is in the box
    seen = []
    for alpha in (0, 0.5, 1, 2, 4, 8, 16):
        maps = attention_maps(FovealTower(demo, Foveal(alpha=alpha, blocks=1)), batch, boxes, owner)[3]
        assert (maps.sum((2, 3)) <= 1 + 1e-5).all()  # the rest is what the class token attends to itself
        seen.append((maps * within[:, None]).sum((2, 3)))  # (K, heads)
    growth = torch.stack(seen).double().diff(dim=0)
    assert (growth[:, within.any((1, 2))] > 0).all()
    assert seen[0].mean() < 0.35
    assert seen[-1].mean() > 0.7


def test_an_encoder_gives_a_unit_vector_a_box(scenes: list[Drawing]) -> None:
    model = resolve(Model(name="demo"))
    pixels, boxes = np.stack([scene.pixels for scene in scenes]), [scene.boxes for scene in scenes]
    boxes[1] = boxes[1][:0]
    encoder = ImageEncoder(model, foveal=Foveal(alpha=4), precision="fp32", batch_size=5)
    found = encoder.encode(pixels, boxes).boxes
    assert found is not None
    assert found.shape == (sum(map(len, boxes)), 128)
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() <= 1e-6
    alone = [encoder.encode(pixels[n : n + 1], boxes[n : n + 1]).boxes for n in range(12) if len(boxes[n])]
    assert np.abs(found - np.concatenate(alone)).max() <= 1e-5  # type: ignore[arg-type]
    plain = ImageEncoder(model, precision="fp32", batch_size=5).encode(pixels).vectors["clip"]
    still = ImageEncoder(model, foveal=Foveal(alpha=0), precision="fp32", batch_size=5).encode(pixels, boxes).boxes
    assert np.abs(still - np.repeat(plain, [len(b) for b in boxes], axis=0)).max() <= 1e-6  # type: ignore[operator]


def test_a_bump_is_highest_in_the_middle_of_its_box() -> None:
    boxes = torch.tensor([[2.0, 4, 4, 6], [0, 0, 8, 8], [6.4, 1.4, 6.6, 1.6]])
    found = bumps(boxes, 8, 8, 1.0)
    assert found.amin((1, 2)).tolist() == [0, 0, 0]
    assert found.amax((1, 2)).tolist() == [1, 1, 1]
    one, e = found[0], np.exp
    assert (one[4:6, 2:4] == 1).all()  # four patches are as near to its centre
    assert one[4, 4] == pytest.approx((e(-(1.5**2 + 0.5**2) / 2) - e(-(4.5**2 * 2) / 2)) / (e(-0.25) - e(-(4.5**2))))
    assert found[1, 0, 0] == 0 == found[1, 7, 7]
    assert found[2, 1, 6] == 1
    assert found[2, 1, 5] == pytest.approx(np.exp(-2), abs=1e-6)  # a box smaller than a patch: as wide as half a one


def test_a_filled_mask_is_its_box() -> None:
    masks = torch.zeros(3, 20, 30)
    masks[0, 5:11, 3:17] = 1
    masks[1] = (torch.arange(20)[:, None] - 10) ** 2 + (torch.arange(30) - 14) ** 2 < 50
    found = boxes_of_masks(masks)
    assert found[0].tolist() == pytest.approx([3, 5, 17, 11], abs=1e-4)
    assert found[1].tolist() == pytest.approx([14.5 - 6, 10.5 - 6, 14.5 + 6, 10.5 + 6], abs=0.1)  # r √3 / 2
    assert found[2].tolist() == pytest.approx([0, 0, 30, 20], abs=1e-4)


def test_towers_that_cannot_be_steered(saved_models: dict[str, Path]) -> None:
    reasons = {"resnet": "it is a ResNet: there is no class token", "timm": "it is timm's ConvNeXt", "vit": None}
    for kind, reason in reasons.items():
        found = refusal(tower_without_weights(architecture(f"local-dir:{saved_models[kind]}")))
        assert found is None if reason is None else reason in str(found)
    pooled = {"pool_type": "avg"}, {"attentional_pool": True}, {"qk_norm": True}
    for how, reason in zip(pooled, ("pools its patches ('avg')", "by attention", "of another make"), strict=True):
        tower = VisionTransformer(32, 16, 32, 1, 2, 2, output_dim=8, **how)  # type: ignore[arg-type]
        assert reason in str(refusal(tower))
    with pytest.raises(
        ModelError, match=r"prompt: foveal: it is none of open_clip's .*; take a ViT .*, or `prompt: crop`"
    ):
        check(torch.nn.Linear(2, 2), Foveal())


def test_falips_blocks_are_those_of_a_vit_of_twelve(visual: Any) -> None:
    theirs = Foveal(mask="falip")
    assert theirs.model_dump() == {
        "mask": "falip", "alpha": 0.2, "sigma": 100, "blocks": [8, 9, 10, 11], "heads": "all",
    }  # fmt: skip
    check(open_clip.create_model("ViT-B-32", pretrained=None, device="meta").visual, theirs)
    large = VisionTransformer(32, 16, 32, layers=24, heads=2, mlp_ratio=1, output_dim=8)
    for tower, depth, third in ((visual, 5, 1), (large, 24, 8)):
        with pytest.raises(
            ModelError, match=rf"its blocks are 8 to 11 of 12, this ViT has {depth}; set .*`blocks: {third}`"
        ):
            check(tower, theirs)
        check(tower, Foveal(mask="falip", blocks=third))


def test_blocks_and_heads_that_are_not_there(visual: Any) -> None:
    for wrong in ({"blocks": DEPTH + 1}, {"blocks": [0, DEPTH]}, {"heads": [3], "blocks": 1}):
        with pytest.raises(ModelError, match=r"foveal: \w+: this ViT has (5 blocks|3 heads), numbered from 0; found"):
            check(visual, Foveal(**wrong))  # type: ignore[arg-type]
    assert refusal(open_clip.create_model("ViT-B-32", pretrained=None, device="meta").visual) is None


@pytest.mark.parametrize("wrong", [{"blocks": []}, {"heads": [1, 1]}, {"blocks": [-1]}, {"alpha": -1}, {"blocks": 0}])
def test_settings_that_mean_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises((ClipRayError, ValueError)):
        Foveal(**wrong)
