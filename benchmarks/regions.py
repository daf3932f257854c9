"""What a vector for each box costs, in each prompt: pictures a second of the encoder alone, all in one run.

    python benchmarks/regions.py [--model ViT-B-16] [--rounds 10] [--batch 16] [--threads 2] [--device cpu]

A ViT with seeded random weights, on pixels made here: no Ray, no decoding, no drawing. `crop` stands for all prompts that
make a picture of each box. The ways take turns in an order that is drawn anew in every round, and a ratio is taken within
its round, so that whatever else the machine does falls on all of them. Printed are medians and, in brackets, quartiles.

`bound` is what the blocks alone allow: a picture costs all blocks up to and including the first masked one, a region each
block behind it but the last, of which only the keys and values of its patches are computed; and each cost is a share of
the plain network's blocks.
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from datetime import datetime

import numpy as np
import torch

from clipray.job import Foveal, Model
from clipray.models.foveal import chosen_blocks
from clipray.models.image_encoder import ImageEncoder
from clipray.models.resolve import resolve

CORES = len(os.sched_getaffinity(0))
DEPTHS: tuple[int | str, ...] = (1, 2, 4, "all")
KEYS_AND_VALUES = 2 / 12  # of a block's products, next to which attention itself is small


def bound(blocks: int | str, depth: int, regions: int) -> float:
    """How many times the plain network's pictures a second the steered one can give."""
    first = chosen_blocks(blocks, depth)[0]
    behind = depth - 1 - first  # blocks behind the first masked one
    if behind == 0:
        return depth / (depth - 1 + KEYS_AND_VALUES)
    shared = first + 1 + (KEYS_AND_VALUES if behind == 1 else 0)
    return depth / (shared + regions * (behind - 1 + (KEYS_AND_VALUES if behind > 1 else 0)))


def boxes_of(rng: np.random.Generator, regions: int, side: int) -> np.ndarray:
    corner = rng.uniform(0, side / 2, (regions, 2))
    return np.concatenate([corner, corner + rng.uniform(side / 8, side / 2, (regions, 2))], axis=1).astype(np.float32)


def rate(work: Callable[[], object], pictures: int, seconds: float) -> float:
    """Pictures a second, of at least one batch and about `seconds` of work."""
    began, done = time.perf_counter(), 0
    while True:
        work()
        done += pictures
        if (spent := time.perf_counter() - began) >= seconds:
            return done / spent


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:8.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=CORES)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = resolve(Model(name=given.model, pretrained="random", seed=0))
    how = {"device": given.device, "batch_size": given.batch}
    plain = ImageEncoder(model, **how)
    foveal = {blocks: ImageEncoder(model, foveal=Foveal(blocks=blocks), **how) for blocks in DEPTHS}
    depth, rng, side = (
        len(foveal[1].network.foveal._visual.transformer.resblocks),
        np.random.default_rng(0),
        model.image_size[0],
    )
    pixels = rng.integers(0, 255, (given.batch, side, side, 3), np.uint8)
    ways: dict[str, Callable[[], object]] = {"plain": lambda: plain.encode(pixels)}
    allowed = {}
    for regions in (1, 8):
        boxes = [boxes_of(rng, regions, side) for _ in pixels]
        cut_out = np.repeat(pixels, regions, axis=0)
        ways[f"crop, {regions}"] = lambda many=cut_out: plain.encode(many)
        for blocks in DEPTHS:
            name = f"foveal in {'the last ' if blocks != 'all' else ''}{blocks}, {regions}"
            ways[name] = lambda e=foveal[blocks], b=boxes: e.encode(pixels, b)
            allowed[name] = bound(blocks, depth, regions)
    print(f"{datetime.now():%d %B %Y %H:%M}; {given.model}, {plain.precision}, {given.device}, batch {given.batch}, "
          f"{given.threads} threads, {given.rounds} rounds, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    for work in ways.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name in random.sample(list(ways), len(ways)):
            found[name].append(rate(ways[name], given.batch, given.seconds))
    for name, rates in found.items():
        against = "crop, 8" if name.endswith(" 8") else "plain"
        ratio = [own / other for own, other in zip(rates, found[against], strict=True)]
        most = f"; bound {allowed[name] * (8 if name.endswith(' 8') else 1):5.2f}" if name in allowed else ""
        print(f"{name:24} {spread(rates)} pictures/s; {spread(ratio)} x {against}{most}")


if __name__ == "__main__":
    main()
