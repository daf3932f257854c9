"""A pool of small training pictures on disk, drawn once by several processes.

Each picture goes the way that a written one goes later: drawn at a larger size, often through JPEG, then resized
(bicubic, shorter side) and centre-cropped to the model's size, as open_clip's own preprocessing does.
"""

from __future__ import annotations

import io
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipray.demo import prompts
from clipray.demo.places import draw_view, sample_place, sample_view
from clipray.demo.scenes import draw, sample_scene, with_word

KIND_SHARES: dict[str, float] = {"single": 0.46, "group": 0.14, "crop": 0.12, "word": 0.10, "place": 0.18}
KINDS: tuple[str, ...] = tuple(KIND_SHARES)
CAPTIONS_PER_PICTURE = 3
VIEWS_PER_PLACE = 4
_CHUNK = 500


@dataclass(frozen=True)
class Sample:
    """A training picture: `image` RGB, captions (one to three), kind, ids of class, ground and place (-1: none)."""

    image: Image.Image
    captions: tuple[str, ...]
    class_id: int
    ground_id: int
    kind: str
    place_number: int = -1


@dataclass(frozen=True)
class Pool:
    """`pixels` uint8 [n, height, width, 3]; `caption_ids` int32 [n, 3] into `captions`; ids int32 [n]; -1: none."""

    pixels: np.ndarray
    caption_ids: np.ndarray
    class_id: np.ndarray
    ground_id: np.ndarray
    kind_id: np.ndarray
    place_number: np.ndarray
    captions: list[str]


def as_seen(image: Image.Image, image_px: int) -> np.ndarray:
    """Resize the shorter side (bicubic), centre-crop: uint8 [image_px, image_px, 3]."""
    scale = image_px / min(image.size)
    width, height = (max(image_px, int(length * scale)) for length in image.size)
    left, top = round((width - image_px) / 2), round((height - image_px) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + image_px, top + image_px)))


def _through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _crop_sample(rng: np.random.Generator, seed: int, index: int, side_px: int) -> Sample:
    scene = sample_scene(seed, index, kind="group" if rng.random() < 0.7 else "single")
    picture = draw(scene, side_px)
    chosen = int(rng.integers(len(picture.boxes)))
    left, top, right, bottom = picture.boxes[chosen]
    slack = rng.uniform(-0.06, 0.25, size=4) * (right - left) * (rng.random() < 0.6)
    corners = (left - slack[0], top - slack[1], right + slack[2], bottom + slack[3])
    left, top, right, bottom = (min(max(round(corner), 0), side_px) for corner in corners)
    thing = scene.things[chosen]
    class_id = prompts.class_labels().index(thing.label)
    caption = picture.box_captions[chosen]
    return Sample(Image.fromarray(picture.pixels).crop((left, top, right, bottom)), (caption,), class_id, -1, "crop")


def _scene_sample(rng: np.random.Generator, seed: int, index: int, kind: str, side_px: int) -> Sample:
    labels = prompts.class_labels()
    if kind == "word" and rng.random() < 0.4:  # a word that says what is there, so that reading pays
        scene = sample_scene(seed, index)
        scene = with_word(scene, scene.label or "")
    else:
        scene = sample_scene(seed, index, kind=kind)  # type: ignore[arg-type]
    class_id = labels.index(scene.label) if scene.label else -1
    image = Image.fromarray(draw(scene, side_px).pixels)
    return Sample(image, scene.captions, class_id, prompts.GROUNDS.index(scene.ground), kind)


def _place_sample(seed: int, index: int, side_px: int) -> Sample:
    place = sample_place(seed, index // VIEWS_PER_PLACE)
    view = sample_view(place, index % VIEWS_PER_PLACE, relation="easy" if index % 2 else "hard")
    image = Image.fromarray(draw_view(place, view, side_px))
    return Sample(image, place.captions, -1, -1, "place", place.index)


def training_sample(seed: int, index: int, kind: str) -> Sample:
    """One training picture of a kind, before it is resized to the model's size."""
    rng = np.random.default_rng([seed, index, 9])
    side_px = int(rng.choice((96, 112, 128, 160, 192), p=(0.3, 0.25, 0.25, 0.12, 0.08)))
    if kind == "crop":
        sample = _crop_sample(rng, seed, index, max(side_px, 128))
    elif kind == "place":
        sample = _place_sample(seed, index, side_px)
    else:
        sample = _scene_sample(rng, seed, index, kind, side_px)
    if rng.random() < 0.5:
        image = _through_jpeg(sample.image, int(rng.integers(70, 96)))
        return replace(sample, image=image)
    return sample


def _draw_chunk(
    seed: int, kind: str, start: int, count: int, image_px: int
) -> tuple[np.ndarray, list[tuple[Any, ...]]]:
    pixels = np.empty((count, image_px, image_px, 3), np.uint8)
    rows = []
    for offset in range(count):
        sample = training_sample(seed, start + offset, kind)
        pixels[offset] = as_seen(sample.image, image_px)
        rows.append((sample.captions, sample.class_id, sample.ground_id, sample.place_number))
    return pixels, rows


def _plan(n_pictures: int) -> list[tuple[str, int, int]]:
    chunks = []
    for kind, share in KIND_SHARES.items():
        total = int(n_pictures * share)
        chunks += [(kind, start, min(_CHUNK, total - start)) for start in range(0, total, _CHUNK)]
    return chunks


def fill_pool(folder: Path, *, seed: int, n_pictures: int, image_px: int, n_processes: int = 2) -> None:
    """Draw about `n_pictures` into `folder`: `pixels.npy`, `rows.npz`, `captions.json`; same seed, same pool."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = _plan(n_pictures)
    total = sum(count for *_, count in chunks)
    shape = (total, image_px, image_px, 3)
    pixels = np.lib.format.open_memmap(folder / "pixels.npy", "w+", dtype=np.uint8, shape=shape)
    numbers = np.full((total, CAPTIONS_PER_PICTURE + 4), -1, np.int32)
    caption_of: dict[str, int] = {}
    with ProcessPoolExecutor(n_processes, mp_context=get_context("spawn")) as workers:
        jobs = [workers.submit(_draw_chunk, seed, kind, start, count, image_px) for kind, start, count in chunks]
        row = 0
        for (kind, _, count), job in zip(chunks, jobs, strict=True):
            pixels[row : row + count], rows = job.result()
            for captions, *ids in rows:
                numbers[row, : len(captions)] = [caption_of.setdefault(text, len(caption_of)) for text in captions]
                numbers[row, CAPTIONS_PER_PICTURE:] = *ids, KINDS.index(kind)
                row += 1
    pixels.flush()
    np.savez(folder / "rows.npz", numbers=numbers)
    (folder / "captions.json").write_text(json.dumps(list(caption_of)), encoding="utf-8")


def open_pool(folder: Path) -> Pool:
    """Open a pool that `fill_pool` wrote; the pixels stay on disk (memory map)."""
    numbers = np.load(folder / "rows.npz")["numbers"]
    class_id, ground_id, place_number, kind_id = numbers[:, CAPTIONS_PER_PICTURE:].T
    return Pool(
        pixels=np.load(folder / "pixels.npy", mmap_mode="r"),
        caption_ids=numbers[:, :CAPTIONS_PER_PICTURE],
        class_id=class_id,
        ground_id=ground_id,
        kind_id=kind_id,
        place_number=place_number,
        captions=json.loads((folder / "captions.json").read_text(encoding="utf-8")),
    )
