"""What layers and poolings cost beside the CLIP vector: pictures a second of the encoder alone, all in one run.

    python benchmarks/features.py [--rounds 40] [--batch 16] [--threads 2]

ViT-B-32 and, for information, RN50, with seeded random weights, on pixels made here: no Ray, no decoding. The ways take
turns in an order that is drawn anew in every round, and a ratio is taken within its round, so that whatever else the
machine does falls on all of them. Printed are medians and, in brackets, quartiles.
"""

import argparse
import os
import random
import statistics
import time
from datetime import datetime

import numpy as np
import torch

from clipray.job import Feature, Model
from clipray.models.image_encoder import ImageEncoder
from clipray.models.resolve import resolve

CORES = len(os.sched_getaffinity(0))
OUTPUT = {"clip": Feature()}


def pooled(layer: str, *poolings: str) -> dict[str, Feature]:
    return {f"{layer} {pooling}": Feature(layer=layer, pooling=pooling) for pooling in poolings}


WAYS: dict[str, dict[str, dict[str, Feature]]] = {
    "ViT-B-32": {
        "output": OUTPUT,
        "output, conv1 mac, conv1 rmac": OUTPUT | pooled("conv1", "mac", "rmac"),
        "conv1 mac": pooled("conv1", "mac"),
        "conv1 mac, conv1 rmac": pooled("conv1", "mac", "rmac"),
        "output, tokens mac, tokens rmac": OUTPUT | pooled("tokens", "mac", "rmac"),
    },
    "RN50": {
        "output": OUTPUT,
        "output, stem mac, stem rmac": OUTPUT | pooled("stem", "mac", "rmac"),
        "stem rmac": pooled("stem", "rmac"),
        "output, layer4 mac, layer4 rmac": OUTPUT | pooled("layer4", "mac", "rmac"),
    },
}


def cost(encoder: ImageEncoder, pixels: np.ndarray, seconds: float) -> tuple[float, float]:
    """Seconds and core-seconds a picture, of at least one batch and about `seconds` of work."""
    wall, core, done = time.perf_counter(), time.process_time(), 0
    while True:
        encoder.encode(pixels)
        done += len(pixels)
        if (spent := time.perf_counter() - wall) >= seconds:
            return spent / done, (time.process_time() - core) / done


def spread(values: list[float]) -> str:
    """`median (lower quartile to upper quartile)`."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=CORES)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--model", action="append", choices=list(WAYS), help="only this one; may be repeated")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.model or WAYS:
        model = resolve(Model(name=name, pretrained="random", seed=0))
        encoders = {
            way: ImageEncoder(model, features=features, precision=options.precision, batch_size=options.batch)
            for way, features in WAYS[name].items()
        }
        pixels = np.random.default_rng(0).integers(0, 256, (options.batch, *model.image_size, 3), dtype=np.uint8)
        for encoder in encoders.values():
            encoder.encode(pixels)  # kernels are chosen per shape
        walls: dict[str, list[float]] = {way: [] for way in encoders}
        cores: dict[str, list[float]] = {way: [] for way in encoders}
        for _ in range(options.rounds):
            for way in random.sample(list(encoders), len(encoders)):
                wall, core = cost(encoders[way], pixels, 0.15)
                walls[way].append(wall)
                cores[way].append(core)
        precision = encoders["output"].precision
        print(
            f"\n{datetime.now():%Y-%m-%d}, {name}, {options.threads} threads, {precision}, batch {options.batch}, {options.rounds} rounds"
        )
        print(
            "| features | pictures/s | core-ms a picture | cost / `output`, by the clock | … by core time |\n|---|---|---|---|---|"
        )
        for way in encoders:
            by_clock = [one / base for one, base in zip(walls[way], walls["output"], strict=True)]
            by_core = [one / base for one, base in zip(cores[way], cores["output"], strict=True)]
            rate, core_ms = [1 / wall for wall in walls[way]], [core * 1e3 for core in cores[way]]
            print(f"| {way} | {spread(rate)} | {spread(core_ms)} | {spread(by_clock)} | {spread(by_core)} |")


if __name__ == "__main__":
    main()
