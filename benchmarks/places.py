"""How well layers and poolings find a place of the demo world again: mean average precision over several worlds.

    python benchmarks/places.py [--seeds 6] [--places 60] [--sides model 128 192]

Each seed draws other places, seen seven times each: a query, two easy and three hard views, a junk one. The gallery is
all views but the queries. mAP is that of the medium protocol: easy and hard views are right, the junk view is left out
(`tools.demo_model.measure.place_map`). Pictures go through the encoder as in a job, in fp32: at the model's own size, or as
`preprocess: keep_aspect` with that `long_side_px`. Everything is seeded: the same versions print the same figures.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from clipray.demo.world import DemoWorld, write_world
from clipray.job import Feature, Model
from clipray.models.image_encoder import ImageEncoder
from clipray.models.preprocess import preprocess_of
from clipray.models.resolve import ResolvedModel, resolve
from tools.demo_model.measure import place_map

FIRST_SEED = 100  # the demo models were trained on seeds from 1,000,000 on
LAYERS = {
    "demo": ("conv1", "block.0", "block.1", "block.2", "block.3", "tokens"),
    "demo-rn": ("conv1", "stem", "layer1", "layer2", "layer3", "layer4"),
}
STRIDE_PX = {"demo": 8, "demo-rn": 32}
POOLINGS = {
    "mac": {"pooling": "mac"},
    "rmac 2": {"pooling": "rmac", "levels": 2},
    "rmac 3": {"pooling": "rmac", "levels": 3},
    "gem": {"pooling": "gem"},
    "spoc": {"pooling": "spoc"},
}

Figures = dict[tuple[str, str, bool, str], float]
"""mAP by (layer, pooling, l2_before, protocol)."""


def features(model: str, with_output: bool) -> dict[str, Feature]:
    """One of each kind, all from one forward pass; a name is its JSON key."""
    made = {
        json.dumps([layer, name, l2_before]): Feature(layer=layer, l2_before=l2_before, **pooling)
        for layer in LAYERS[model]
        for name, pooling in POOLINGS.items()
        for l2_before in (True, False)
    }
    return made | ({json.dumps(["output", "", True]): Feature()} if with_output else {})


def pixels_of(model: ResolvedModel, name: str, side: str) -> Callable[[Image.Image], np.ndarray]:
    """PIL image -> (H, W, 3) uint8."""
    if side == "model":
        return preprocess_of(model)
    keep = preprocess_of(model, keep_aspect=(int(side), STRIDE_PX[name]))
    return lambda image: keep(image, image.height, image.width)


def figures(world: DemoWorld, name: str, side: str) -> Figures:
    """Every layer and pooling of a model on one world."""
    model = resolve(Model(name=name, precision="fp32"))
    preprocess = pixels_of(model, name, side)
    rows = pq.read_table(world.images, columns=["image_id", "uri"]).to_pylist()
    pixels = np.stack([preprocess(Image.open(world.folder / row["uri"]).convert("RGB")) for row in rows])
    wanted = features(name, with_output=side == "model" or name == "demo")
    encoder = ImageEncoder(model, features=wanted, precision="fp32", batch_size=16)
    found: Figures = {}
    for key, vectors in encoder.encode(pixels).vectors.items():
        layer, pooling, l2_before = json.loads(key)
        ids = [row["image_id"] for row in rows]
        for metric, value in place_map(world, dict(zip(ids, vectors, strict=True))).items():
            found[layer, pooling, l2_before, metric.split()[-1]] = value
    return found


def spread(values: list[float], sign: str = "") -> str:
    """`mean ± standard deviation` over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.3f} ± {deviation:.3f}"


def lines(seeds: list[Figures], name: str, l2_before: bool, protocol: str) -> Iterator[str]:
    """Rows of a Markdown table: a layer each."""
    for layer in LAYERS[name]:
        by = {pooling: [seed[layer, pooling, l2_before, protocol] for seed in seeds] for pooling in POOLINGS}
        gains = [[r - m for r, m in zip(by[rmac], by["mac"], strict=True)] for rmac in ("rmac 2", "rmac 3")]
        cells = [*(spread(values) for values in by.values()), *(spread(gain, "+") for gain in gains)]
        yield f"| `{layer}` | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--places", type=int, default=60)
    parser.add_argument("--sides", nargs="+", default=["model", "128", "192"], metavar="PX")
    parser.add_argument("--models", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--protocol", default="medium", choices=["easy", "medium", "hard"])
    options = parser.parse_args()
    found: dict[tuple[str, str], list[Figures]] = {}
    for seed in range(FIRST_SEED, FIRST_SEED + options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            world = write_world(Path(folder), seed=seed, n_scenes=0, n_groups=0, n_words=0, n_places=options.places)
            for name in options.models:
                for side in options.sides:
                    found.setdefault((name, side), []).append(figures(world, name, side))
    for (name, side), seeds in found.items():
        own = "the model's 64 px" if side == "model" else f"keep_aspect, {side} px"
        print(f"\n{name}, {own}: mAP {options.protocol}, {options.seeds} worlds of {options.places} places")
        if ("output", "", True, "easy") in seeds[0]:
            print(f"output: {spread([seed['output', '', True, options.protocol] for seed in seeds])}")
        for l2_before in (True, False):
            print(f"\nl2_before: {str(l2_before).lower()}")
            print(f"| layer | {' | '.join(POOLINGS)} | rmac 2 − mac | rmac 3 − mac |")
            print("|---" * (len(POOLINGS) + 3) + "|")
            print("\n".join(lines(seeds, name, l2_before, options.protocol)))


if __name__ == "__main__":
    main()
