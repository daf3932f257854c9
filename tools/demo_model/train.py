"""Train the demo CLIP: ``python -m tools.demo_model.train --pool /tmp/clipray-pool --out clipray/demo/model``.

Draws a pool of pictures once (three minutes on 2 cores), then trains for `--steps` or `--minutes`, whichever ends
first; every number that matters is in `TrainSettings`. Prints held-out figures on the way and at the end.

Made for CPUs: bf16 forward and backward with float32 master weights, attention without the fused kernel (whose backward
pass is slower on CPUs), a token table of only the tokens that occur (put back in its place when saved), and memory
kept by the allocator between steps (`_keep_memory`).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipray.demo import prompts
from tools.demo_model import measure
from tools.demo_model.compact import CompactClip, build_compact, save_full
from tools.demo_model.losses import clip_loss, list_texts, text_batch
from tools.demo_model.pool import KINDS, VIEWS_PER_PLACE, Pool, as_seen, fill_pool, open_pool, training_sample

HELD_OUT_SEED = 77
_FLIPPABLE = ("single", "crop", "place")  # words would be mirrored, and groups are named from left to right


@dataclass(frozen=True)
class TrainSettings:
    """All settings of a run. `easy_share`: the part of the run that sees single things and crops only."""

    pool: Path
    out: Path
    name: str = "demo"
    seed: int = 1_000_001
    n_pictures: int = 176_000
    batch_size: int = 256
    places_per_batch: int = 28
    steps: int = 5_400
    minutes: float = 60.0
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 150
    easy_share: float = 0.12
    report_every_s: float = 120.0
    n_held_out: int = 512


class Sampler:
    """Batches of row numbers: single things and crops first, then everything, with two views of some places. Seeded."""

    def __init__(self, pool: Pool, settings: TrainSettings) -> None:
        self.rng = np.random.default_rng(settings.seed)
        self.batch_size, self.n_places = settings.batch_size, settings.places_per_batch
        easy = np.isin(pool.kind_id, [KINDS.index("single"), KINDS.index("crop")])
        self.rows = {"easy": np.flatnonzero(easy), "scenes": np.flatnonzero(pool.place_number < 0)}
        self.left = {name: np.empty(0, np.int64) for name in self.rows}
        places = np.flatnonzero(pool.place_number >= 0)
        n_whole = len(places) // VIEWS_PER_PLACE  # views of a place are neighbours in the pool
        self.views = places[: n_whole * VIEWS_PER_PLACE].reshape(n_whole, VIEWS_PER_PLACE)

    def _take(self, name: str, count: int) -> np.ndarray:
        if len(self.left[name]) < count:
            self.left[name] = self.rng.permutation(self.rows[name])
        batch, self.left[name] = np.split(self.left[name], [count])
        return batch

    def next_rows(self, easy: bool) -> np.ndarray:
        """Row numbers of the next batch, sorted (so that the memory map is read in order)."""
        if easy:
            return np.sort(self._take("easy", self.batch_size))
        scenes = self._take("scenes", self.batch_size - 2 * self.n_places)
        views = self.rng.permuted(self.views[self.rng.choice(len(self.views), self.n_places, replace=False)], axis=1)
        return np.sort(np.concatenate([scenes, views[:, :2].ravel()]))


def load_images(pool: Pool, rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Pixels of a batch, a part of them mirrored or shifted by a few pixels: uint8 [batch, 3, height, width]."""
    pixels = pool.pixels[rows]
    flippable = np.isin(pool.kind_id[rows], [KINDS.index(kind) for kind in _FLIPPABLE])
    flipped = flippable & (rng.random(len(rows)) < 0.5)
    pixels[flipped] = pixels[flipped, :, ::-1]
    side_px = pixels.shape[1]
    padded = np.pad(pixels, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    for part in np.array_split(np.arange(len(rows)), 8):  # one shift for each eighth
        top, left = rng.integers(0, 9, size=2)
        pixels[part] = padded[part, top : top + side_px, left : left + side_px]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


class Optimiser:
    """Float32 masters of a bf16 model: Muon for the matrices of the blocks, AdamW for the rest."""

    def __init__(self, model: nn.Module, settings: TrainSettings) -> None:
        self.settings = settings
        self.live: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.master = [p.detach().float().clone().requires_grad_() for p in self.live]
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        matrix = ["resblocks" in name and p.ndim == 2 for name, p in zip(names, self.live, strict=True)]
        rate, decay = settings.learning_rate, settings.weight_decay
        blocks = [p for p, is_matrix in zip(self.master, matrix, strict=True) if is_matrix]
        others = [p for p, is_matrix in zip(self.master, matrix, strict=True) if not is_matrix]
        groups = [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))]
        if blocks:
            self.optimisers.append(
                torch.optim.Muon(blocks, lr=2 * rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            )
        self.base_rates = [[group["lr"] for group in o.param_groups] for o in self.optimisers]

    def step(self, scale: float) -> None:
        """One update at `scale` times the base rates, from the gradients of the live model."""
        for live, master in zip(self.live, self.master, strict=True):
            master.grad = None if live.grad is None else live.grad.float()
            live.grad = None
        torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        for optimiser, rates in zip(self.optimisers, self.base_rates, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            optimiser.step()
        with torch.no_grad():
            for live, master in zip(self.live, self.master, strict=True):
                live.copy_(master)


def rate_scale(step: int, progress: float, settings: TrainSettings) -> float:
    """Linear warm-up, then half a cosine down to 1 % of the base rate."""
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def held_out_batch(n_pictures: int, image_px: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Single scenes of another seed: uint8 [n, 3, height, width] and their class ids int64 [n]."""
    samples = [training_sample(HELD_OUT_SEED, index, "single") for index in range(n_pictures)]
    pixels = np.stack([as_seen(sample.image, image_px) for sample in samples])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([sample.class_id for sample in samples])


@torch.no_grad()
def quick_accuracy(model: CompactClip, held_out: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Zero-shot accuracy with template prompts on the small held-out batch."""
    pixels, class_id = held_out
    model.eval()
    texts = model.encode_text([prompts.class_prompt(label, "template") for label in prompts.class_labels()])
    image_features = torch.cat([model.encode_image(part) for part in torch.split(pixels, 256)])
    model.train()
    return float(((image_features @ texts.T).argmax(1) == class_id).float().mean())


def train(settings: TrainSettings) -> Path:
    """Draw the pool where it is missing, train, and save `<out>/<name>.safetensors`; returns that path."""
    torch.manual_seed(settings.seed)
    config = settings.out / f"{settings.name}.json"
    weights = config.with_suffix(".safetensors")
    image_px = measure.read_config(config)["vision_cfg"]["image_size"]
    if not (settings.pool / "captions.json").exists():
        fill_pool(settings.pool, seed=settings.seed, n_pictures=settings.n_pictures, image_px=image_px)
    pool = open_pool(settings.pool)
    model = build_compact(config, {*pool.captions, *list_texts()})
    optimiser, sampler = Optimiser(model, settings), Sampler(pool, settings)
    held_out = held_out_batch(settings.n_held_out, image_px)
    started = reported = time.monotonic()
    progress, step, running = 0.0, 0, 0.0
    while progress < 1.0:
        progress = max(step / settings.steps, (time.monotonic() - started) / 60 / settings.minutes)
        rows = sampler.next_rows(easy=progress < settings.easy_share)
        batch = text_batch(pool, rows, sampler.rng)
        with sdpa_kernel(SDPBackend.MATH):
            loss = clip_loss(model, load_images(pool, rows, sampler.rng), batch)
            torch.autograd.backward(loss)
        optimiser.step(rate_scale(step, progress, settings))
        step, running = step + 1, 0.98 * running + 0.02 * loss.item() if step else loss.item()
        if time.monotonic() - reported > settings.report_every_s or progress >= 1.0:
            reported = time.monotonic()
            print(f"{(reported - started) / 60:5.1f} min  step {step:5d}  loss {running:.3f}  ", end="")
            print(f"held-out accuracy {quick_accuracy(model, held_out):.3f}", flush=True)
            save_full(model, optimiser.live, optimiser.master, weights)
    return weights


def _keep_memory() -> None:
    """Start again with an allocator that keeps freed memory: page faults cost a third of the time otherwise (glibc)."""
    wanted = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
    if any(os.environ.get(key) != value for key, value in wanted.items()):
        os.environ.update(wanted, MALLOC_TOP_PAD_="500000000")
        os.execv(sys.executable, [sys.executable, "-m", "tools.demo_model.train", *sys.argv[1:]])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo CLIP on drawn scenes.")
    parser.add_argument("--pool", type=Path, required=True, help="folder for the drawn pictures (2 GB)")
    parser.add_argument("--out", type=Path, required=True, help="folder with <name>.json; the weights go beside it")
    for name in ("name", "seed", "n_pictures", "batch_size", "steps", "minutes", "learning_rate", "easy_share"):
        default = TrainSettings.__dataclass_fields__[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    settings = TrainSettings(**vars(parser.parse_args()))
    _keep_memory()
    weights = train(settings)
    for metric, value in measure.held_out_figures(settings.out / f"{settings.name}.json", weights).items():
        print(f"{metric:64s} {value:.4f}")


if __name__ == "__main__":
    main()
