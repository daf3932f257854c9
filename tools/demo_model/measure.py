"""Held-out figures of the demo CLIP, measured through open_clip's own loading and preprocessing.

``python -m tools.demo_model.measure [CONFIG]`` writes a world of another seed than training's to a temporary folder and
prints them for the model of an open_clip configuration with its weights beside it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch
from open_clip.model import CLIP
from PIL import Image

from clipray.demo import MODEL_DIR, prompts
from clipray.demo.scenes import Scene, contradicting_word, draw, sample_scene, with_word
from clipray.demo.world import DemoWorld, write_world

HELD_OUT_SEED = 4_000
_MEANINGLESS = "hello world"


def read_config(path: Path) -> dict[str, Any]:
    """An open_clip model configuration."""
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class DemoClip:
    """The model as any open_clip user gets it. Both encoders return unit vectors, float32 [n, embed_dim]."""

    model: CLIP
    preprocess: Callable[[Image.Image], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor]

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image], batch_size: int = 128) -> np.ndarray:
        parts = []
        for start in range(0, len(images), batch_size):
            batch = torch.stack([self.preprocess(image) for image in images[start : start + batch_size]])
            parts.append(self.model.encode_image(batch, normalize=True).float())
        return torch.cat(parts).numpy()

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        return self.model.encode_text(self.tokenizer(list(texts)), normalize=True).float().numpy()


def load_demo(config: Path = MODEL_DIR / "demo.json", weights: Path | None = None) -> DemoClip:
    """Load a model from its open_clip configuration and the weights beside it."""
    open_clip.add_model_config(config)
    weights = weights or config.with_suffix(".safetensors")
    model, _, preprocess = open_clip.create_model_and_transforms(config.stem, pretrained=str(weights))
    return DemoClip(model.eval(), preprocess, open_clip.get_tokenizer(config.stem))


def zero_shot_accuracy(clip: DemoClip, images: np.ndarray, labels: Sequence[str], style: prompts.PromptStyle) -> float:
    """Share of pictures (vectors [n, embed_dim]) whose best of all 64 class prompts is their own."""
    return float(np.mean([p == label for p, label in zip(predict(clip, images, style), labels, strict=True)]))


def predict(clip: DemoClip, images: np.ndarray, style: prompts.PromptStyle = "template") -> list[str]:
    """The best class of each picture."""
    names = prompts.class_labels()
    texts = clip.encode_texts([prompts.class_prompt(name, style) for name in names])
    return [names[best] for best in (images @ texts.T).argmax(axis=1)]


def caption_recall(clip: DemoClip, images: np.ndarray, captions: Sequence[str], top: int = 5) -> float:
    """Share of captions for which one of the `top` pictures found has the very same caption (each caption once)."""
    wanted = sorted(set(captions))
    best = np.argsort(-(clip.encode_texts(wanted) @ images.T), axis=1, kind="stable")[:, :top]
    return float(np.mean([any(captions[i] == text for i in found) for text, found in zip(wanted, best, strict=True)]))


def own_box_share(clip: DemoClip, world: DemoWorld) -> tuple[float, float]:
    """Of pairs (box, other box of the scene): how often a box's caption prefers its own crop; and over all boxes."""
    groups = [row for row in pq.read_table(world.images).to_pylist() if row["kind"] == "group"]
    crops = []
    for row in groups:
        with Image.open(world.folder / row["uri"]) as image:
            whole = image.convert("RGB")
        crops += [whole.crop((left, top, right, bottom)) for left, top, right, bottom in row["boxes"]]
    images = clip.encode_images(crops)
    texts = clip.encode_texts([caption for row in groups for caption in row["box_captions"]])
    pairs, alone, start = [], [], 0
    for n_boxes in (len(row["boxes"]) for row in groups):
        part = slice(start, start := start + n_boxes)
        scores = texts[part] @ images[part].T  # [n_boxes, n_boxes]: caption, crop
        wins = np.diag(scores)[:, None] > scores
        pairs += wins[~np.eye(n_boxes, dtype=bool)].tolist()
        alone += (wins.sum(axis=1) == n_boxes - 1).tolist()
    return float(np.mean(pairs)), float(np.mean(alone))


def word_figures(clip: DemoClip, *, seed: int, n_scenes: int, side_px: int = 192) -> dict[str, float]:
    """What written words do to the label of pictures that were right without one, and whether a word alone is read."""
    scenes = [sample_scene(seed, index) for index in range(n_scenes)]
    before = predict(clip, clip.encode_images(_drawn(scenes, side_px)))
    right = [scene for scene, label in zip(scenes, before, strict=True) if label == scene.label]
    words = {
        "contradicting": [contradicting_word(scene) for scene in right],
        "meaningless": [_MEANINGLESS] * len(right),
        "true": [scene.label or "" for scene in right],
    }
    figures = {}
    for name, written in words.items():
        marked = [with_word(scene, word) for scene, word in zip(right, written, strict=True)]
        after = predict(clip, clip.encode_images(_drawn(marked, side_px)))
        flips = [label != scene.label for scene, label in zip(right, after, strict=True)]
        figures[f"{name} word: label flips"] = float(np.mean(flips))
        pairs = list(zip(words["contradicting"], after, strict=True))
        if name != "true":
            taken = [bool(set(word.split()) & set(label.split())) for word, label in pairs]
            figures[f"{name} word: colour or shape of the contradicting word"] = float(np.mean(taken))
    alone = [sample_scene(seed, index, kind="word") for index in range(n_scenes)]
    read = predict(clip, clip.encode_images(_drawn(alone, side_px)))
    figures["word alone: read"] = float(
        np.mean([scene.word == label for scene, label in zip(alone, read, strict=True)])
    )
    return figures


def _drawn(scenes: Sequence[Scene], side_px: int) -> list[Image.Image]:
    return [Image.fromarray(draw(scene, side_px).pixels) for scene in scenes]


def _average_precision(is_positive: np.ndarray) -> float:
    hits = np.flatnonzero(is_positive)
    return float(np.mean((np.arange(len(hits)) + 1) / (hits + 1)))


def place_map(world: DemoWorld, vectors: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean average precision over the world's pictures; positives: easy, easy and hard, hard. The rest is left out."""
    relations: dict[str, dict[str, str]] = {}
    for row in pq.read_table(world.queries).to_pylist():
        relations.setdefault(row["query_id"], {})[row["image_id"]] = row["relation"]
    ids = [image_id for image_id in vectors if image_id not in relations]
    gallery = np.stack([vectors[image_id] for image_id in ids])
    figures = {}
    for name, wanted in (("easy", {"easy"}), ("medium", {"easy", "hard"}), ("hard", {"hard"})):
        precisions = []
        for query_id, relation in relations.items():
            ranked = [ids[i] for i in np.argsort(-(gallery @ vectors[query_id]), kind="stable")]
            kept = [i for i in ranked if relation.get(i) is None or relation[i] in wanted]
            precisions.append(_average_precision(np.array([i in relation for i in kept])))
        figures[f"places: mAP {name}"] = float(np.mean(precisions))
    return figures


def world_figures(clip: DemoClip, world: DemoWorld) -> dict[str, float]:
    """All figures that a written world can give."""
    rows = pq.read_table(world.images).to_pylist()
    images = []
    for row in rows:
        with Image.open(world.folder / row["uri"]) as image:
            images.append(image.convert("RGB"))
    vectors = clip.encode_images(images)
    single = [i for i, row in enumerate(rows) if row["kind"] == "single"]
    labels, captions = ([rows[i][name] for i in single] for name in ("label", "caption"))
    figures = {
        f"zero-shot accuracy, {style}": zero_shot_accuracy(clip, vectors[single], labels, style)
        for style in prompts.PROMPT_STYLES
    }
    for top in (1, 5):
        recall = caption_recall(clip, vectors[single], captions, top)
        figures[f"text to image recall@{top}"] = recall
    figures["own box before another (pairs)"], figures["own box before all others"] = own_box_share(clip, world)
    return figures | place_map(world, {row["image_id"]: v for row, v in zip(rows, vectors, strict=True)})


def held_out_figures(config: Path = MODEL_DIR / "demo.json", weights: Path | None = None) -> dict[str, float]:
    """All figures on a fresh world of 1,000 single things, 300 groups and 100 places."""
    clip = load_demo(config, weights)
    with tempfile.TemporaryDirectory() as folder:
        world = write_world(folder, seed=HELD_OUT_SEED, n_scenes=1000, n_groups=300, n_words=0, n_places=100)
        figures = world_figures(clip, world)
    return figures | word_figures(clip, seed=HELD_OUT_SEED + 10, n_scenes=500)


if __name__ == "__main__":
    for metric, value in held_out_figures(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL_DIR / "demo.json").items():
        print(f"{metric:64s} {value:.4f}")
