"""What the class token looks at, as pictures: groups of the demo world, a box of each, at three strengths.

    python benchmarks/attention_maps.py docs/attention-maps.png [--pictures 5]

Rows are pictures of the built-in world, each with a box; columns are the picture and its box, and over it the attention of
the `demo` model's class token in its last two blocks, both of which are masked, at alpha 0, 2 and 8: the mean of the blocks
and of their heads, each map scaled by its own highest value. The share under a map is the attention that lies in the box.
"""

import argparse
import math
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from clipray.demo.scenes import Drawing, draw, sample_scene
from clipray.job import Foveal, Model
from clipray.models import foveal
from clipray.models.foveal import FovealTower
from clipray.models.image_encoder import mean_and_std
from clipray.models.load import load
from clipray.models.preprocess import preprocess_of
from clipray.models.resolve import resolve

ALPHAS = (0, 2, 8)
SIDE_PX, GAP_PX, FOOT_PX = 192, 8, 24
MODEL = resolve(Model(name="demo"))
HOT = np.array([[0, 0, 0], [90, 10, 110], [220, 50, 40], [255, 170, 20], [255, 255, 200]], np.float64)


def attention_maps(
    tower: FovealTower, batch: torch.Tensor, boxes: torch.Tensor, owner: torch.Tensor
) -> dict[int, torch.Tensor]:
    """What class tokens attend to, by block from the first masked one on: (K, heads, h, w), the rest being on themselves."""
    attention, weights = foveal.scaled_dot_product_attention, []

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any) -> torch.Tensor:
        logits = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5  # (k, heads, 1, n)
        weights.append((logits if attn_mask is None else logits + attn_mask.float()).softmax(dim=-1)[:, :, 0, 1:])
        return attention(q, k, v, attn_mask=attn_mask)

    with mock.patch.object(foveal, "scaled_dot_product_attention", watched):
        tower.steered(batch, boxes, owner)
    first, depth = tower.blocks[0], len(foveal.visual_of(tower)[1].transformer.resblocks)
    side, count = math.isqrt(weights[0].shape[-1]), depth - first  # blocks follow one another in each part of the boxes
    return {first + n: torch.cat(weights[n::count]).unflatten(2, (side, side)) for n in range(count)}


def maps_of(scenes: list[Drawing], boxes: torch.Tensor) -> dict[int, np.ndarray]:
    """By alpha (n, 8, 8): the class token's attention, mean of the last two blocks and of all heads."""
    to_pixels, (mean, std) = preprocess_of(MODEL), mean_and_std(MODEL)
    pixels = np.stack([to_pixels(Image.fromarray(scene.pixels)) for scene in scenes])
    batch = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    visual, owner = load(MODEL).visual, torch.arange(len(scenes))
    found = {}
    with torch.inference_mode():
        for alpha in ALPHAS:
            maps = attention_maps(FovealTower(visual, Foveal(alpha=alpha)), batch, boxes * 64 / SIDE_PX, owner)
            found[alpha] = torch.stack(list(maps.values())).mean(dim=(0, 2)).numpy()
    return found


def laid_over(pixels: np.ndarray, attention: np.ndarray) -> Image.Image:
    """The picture in grey, the attention over it from dark to bright."""
    high = Image.fromarray((attention / attention.max()).astype(np.float32)).resize(
        (SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC
    )
    level = np.asarray(high).clip(0, 1) * (len(HOT) - 1)
    colour = np.stack([np.interp(level, np.arange(len(HOT)), HOT[:, c]) for c in range(3)], axis=-1)
    grey = np.repeat(pixels.mean(axis=-1, keepdims=True), 3, axis=-1)
    return Image.fromarray((0.35 * grey + 0.65 * colour).round().astype(np.uint8))


def within(attention: np.ndarray, box: np.ndarray) -> float:
    """Share of the attention to patches whose centres lie in the box."""
    at = (np.arange(8) + 0.5) * SIDE_PX / 8
    inside = ((at > box[1]) & (at < box[3]))[:, None] & ((at > box[0]) & (at < box[2]))
    return float(attention[inside].sum())


def sheet(scenes: list[Drawing], boxes: np.ndarray, maps: dict[int, np.ndarray]) -> Image.Image:
    step, font = SIDE_PX + GAP_PX, ImageFont.load_default(14)
    canvas = Image.new("RGB", (step * (1 + len(ALPHAS)) + GAP_PX, (step + FOOT_PX) * len(scenes) + GAP_PX), "white")
    pen = ImageDraw.Draw(canvas)
    for n, (scene, box) in enumerate(zip(scenes, boxes, strict=True)):
        top = GAP_PX + n * (step + FOOT_PX)
        shown = [Image.fromarray(scene.pixels), *(laid_over(scene.pixels, maps[alpha][n]) for alpha in ALPHAS)]
        said = [scene.box_captions[0], *(f"alpha {a}: {within(maps[a][n], box):.0%} in the box" for a in ALPHAS)]
        for column, (image, text) in enumerate(zip(shown, said, strict=True)):
            ImageDraw.Draw(image).rectangle([*box.tolist()], outline="white", width=2)
            canvas.paste(image, (GAP_PX + column * step, top))
            pen.text((GAP_PX + column * step, top + SIDE_PX + 3), text, fill="black", font=font)
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--pictures", type=int, default=5)
    parser.add_argument("--seed", type=int, default=50)
    given = parser.parse_args()
    scenes = [draw(sample_scene(given.seed, n, kind="group"), SIDE_PX) for n in range(given.pictures)]
    boxes = np.stack([scene.boxes[0] for scene in scenes])
    sheet(scenes, boxes, maps_of(scenes, torch.from_numpy(boxes))).quantize(160).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
