"""How well a vector of a box says what is in it, in each prompt: captions that find their box, boxes that find their class.

    python benchmarks/region_prompts.py [--groups 300] [--seed 50] [--sweep]

The `demo` model on groups of the built-in world (two to four things each) that its training never saw: no Ray, no tables,
fp32. Chance is what a guess would reach. `--sweep` tries other blocks, widths, strengths and heads of foveal attention.
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import open_clip
import torch
from PIL import Image

from clipray.analysis.referring import others, refer
from clipray.demo.prompts import class_labels, class_prompt
from clipray.demo.scenes import draw, sample_scene
from clipray.job import EmbedRegions, Foveal, Model
from clipray.models.image_encoder import ImageEncoder
from clipray.models.load import load
from clipray.models.preprocess import preprocess_of
from clipray.models.resolve import resolve
from clipray.pipelines.region import views

SIDE_PX = 192
MODEL = resolve(Model(name="demo"))


@dataclass(frozen=True)
class World:
    """Groups: their pictures, boxes, the vectors of captions and of the right classes."""

    images: list[Image.Image]
    boxes: list[np.ndarray]
    captions: np.ndarray
    truth: np.ndarray
    classes: np.ndarray


def world(groups: int, seed: int) -> World:
    scenes = [sample_scene(seed, n, kind="group") for n in range(groups)]
    pictures = [draw(scene, SIDE_PX) for scene in scenes]
    network, tokenizer, labels = load(MODEL), open_clip.get_tokenizer("demo"), list(class_labels())
    with torch.inference_mode():
        captions = network.encode_text(tokenizer([c for p in pictures for c in p.box_captions]), normalize=True)
        classes = network.encode_text(tokenizer([class_prompt(x, "template") for x in labels]), normalize=True)
    truth = [labels.index(thing.label) for scene in scenes for thing in scene.things]
    images = [Image.fromarray(p.pixels) for p in pictures]
    return World(images, [p.boxes for p in pictures], captions.numpy(), np.array(truth), classes.numpy())


def vectors(how: EmbedRegions, given: World) -> np.ndarray:
    """(K, 128), of all boxes."""
    to_pixels = preprocess_of(MODEL)
    if how.prompt in ("crop", "blur", "circle"):
        shown = [
            to_pixels(v) for im, boxes in zip(given.images, given.boxes, strict=True) for v in views(im, boxes, how)
        ]
        return ImageEncoder(MODEL, precision="fp32", batch_size=64).encode(np.stack(shown)).vectors["clip"]
    pixels = np.stack([to_pixels(image) for image in given.images])
    foveal = how.foveal if how.prompt == "foveal" else Foveal(alpha=0)
    on_input = [boxes * (64 / SIDE_PX) for boxes in given.boxes]
    found = ImageEncoder(MODEL, foveal=foveal, precision="fp32", batch_size=64).encode(pixels, on_input).boxes
    assert found is not None
    return found


def figures(x: np.ndarray, given: World) -> dict[str, float]:
    edges = np.cumsum([0, *map(len, given.boxes)])
    rng, count = np.random.default_rng(0), min(500, len(given.captions))
    with_any = x @ rng.choice(given.captions, count, replace=False).mean(axis=0)
    right: dict[str, int] = dict.fromkeys(("others", "dataset", "nothing"), 0)
    for start, stop in itertools.pairwise(edges):
        similarity = x[start:stop] @ given.captions[start:stop].T
        baselines = {"others": others(similarity), "dataset": with_any[start:stop, None], "nothing": 0.0}
        for subtract, baseline in baselines.items():
            right[subtract] += int((refer(similarity, baseline).best == np.arange(stop - start)).sum())
    labels = (x @ given.classes.T).argmax(axis=1)
    found = {f"refer less {subtract}": count / len(x) for subtract, count in right.items()}
    return {**found, "class": float((labels == given.truth).mean())}


def show(name: str, how: EmbedRegions, given: World) -> None:
    found = figures(vectors(how, given), given)
    print(f"{name:42} " + "   ".join(f"{key} {100 * value:5.1f} %" for key, value in found.items()), flush=True)


def prompt(name: str, **settings: object) -> EmbedRegions:
    return EmbedRegions(name="regions", manifest="", prompt=name, **settings)  # type: ignore[arg-type]


def sweep(given: World) -> None:
    for blocks in (1, 2, 3, "all", [0], [1], [2]):
        for sigma in (0.5, 1.0, 2.0):
            for alpha in (1, 2, 4, 8, 16):
                how = prompt("foveal", foveal={"alpha": alpha, "sigma": sigma, "blocks": blocks})
                show(f"foveal, blocks {blocks}, sigma {sigma}, alpha {alpha}", how, given)
    for blocks in (1, 2, 3, "all"):
        for alpha in (0.2, 1, 2, 4, 8, 16):
            how = prompt("foveal", foveal={"mask": "falip", "alpha": alpha, "blocks": blocks})
            show(f"falip, blocks {blocks}, alpha {alpha}", how, given)
    for heads in ([0], [1], [0, 1], [2, 3]):
        show(f"foveal, heads {heads}", prompt("foveal", foveal={"heads": heads}), given)
    for radius in (0.01, 0.1):
        show(f"blur, radius {radius}", prompt("blur", blur={"radius": radius}), given)
    for circle in ({"width": 0.01}, {"width": 0.05}, {"colour": "white"}, {"colour": "black"}):
        show(f"circle, {circle}", prompt("circle", circle=circle), given)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=300)
    parser.add_argument("--seed", type=int, default=50)
    parser.add_argument("--sweep", action="store_true")
    given_arguments = parser.parse_args(arguments)
    given = world(given_arguments.groups, given_arguments.seed)
    counts = [len(boxes) for boxes in given.boxes]
    print(
        f"{len(counts)} groups, {sum(counts)} boxes; chance: refer {100 * len(counts) / sum(counts):.1f} %, class 1.6 %"
    )
    for name in ("foveal", "crop", "blur", "circle", "none"):
        show(name, prompt(name), given)
    show("falip, its last third of blocks", prompt("foveal", foveal={"mask": "falip", "blocks": 1}), given)
    if given_arguments.sweep:
        sweep(given)


if __name__ == "__main__":
    main()
