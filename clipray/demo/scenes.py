"""Scenes of the demo world: one to four things on a ground, or a written word, drawn with NumPy from a seed.

A `Scene` says what there is; `draw` gives its pixels. The same seed and index give the same scene and, on one set of
library versions, the same pixels. Lengths in a scene are shares of the image's side; boxes of a drawn `Drawing` are
pixels, xyxy, half-open, origin top left, and span the whole thing inside the image, also where something hides it.

``python -m tools.demo_scenes docs/demo-scenes.jpg`` draws a contact sheet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from clipray.demo import prompts
from clipray.demo.painting import Lighting, Thing, draw_ground, draw_post, draw_thing, draw_word, finish

SceneKind = Literal["single", "group", "word"]
_MAX_OVERLAP = 0.25  # share of the smaller thing's square that two things of a scene may share


@dataclass(frozen=True)
class Scene:
    """All that an image shows. `index` and `seed` also seed the noise and the small differences of colour."""

    seed: int
    index: int
    kind: SceneKind
    things: tuple[Thing, ...]
    ground: str
    pattern: str
    lighting: Lighting
    word: str | None = None
    has_post: bool = False

    @property
    def label(self) -> str | None:
        """The class of a scene with one thing; the word's for an image that shows only a word; None for a group."""
        if self.kind == "word" and not self.things:
            return self.word
        return self.things[0].label if len(self.things) == 1 else None

    @property
    def captions(self) -> tuple[str, ...]:
        """What the image shows (a word written over a thing is left out), the caption to search with first."""
        if not self.things:
            return prompts.word_captions(self.word or "", ground=self.ground)
        if len(self.things) > 1:
            ordered = sorted(self.things, key=lambda thing: thing.centre_x)
            return prompts.group_captions(tuple(thing.label for thing in ordered), ground=self.ground)
        thing = self.things[0]
        return prompts.scene_captions(
            thing.label, size=thing.size, texture=thing.texture, ground=self.ground, pattern=self.pattern
        )


@dataclass(frozen=True)
class Drawing:
    """A drawn scene: `pixels` uint8 [height, width, 3]; `boxes` float32 [n, 4], pixels xyxy; one caption a box."""

    pixels: np.ndarray
    boxes: np.ndarray
    box_captions: tuple[str, ...]


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _sample_thing(rng: np.random.Generator, label: str, *, crowd: int) -> Thing:
    colour, shape = label.split(" ")
    size = _pick(rng, prompts.SIZES)
    low, high = (0.15, 0.19) if size == "small" else (0.26, 0.36)
    if crowd > 1:
        low, high = (0.12, 0.15) if size == "small" else (0.17, 0.22 if crowd < 4 else 0.19)
    radius = float(rng.uniform(low, high))
    margin = 0.92 * radius
    centre_x, centre_y = rng.uniform(margin, 1 - margin, size=2)
    texture = "plain" if rng.random() < 0.5 else _pick(rng, prompts.TEXTURES[1:])
    turn_rad = float(rng.uniform(-0.45, 0.45))
    return Thing(shape, colour, texture, size, float(centre_x), float(centre_y), radius, turn_rad)


def _overlap(one: Thing, other: Thing) -> float:
    reach = one.radius + other.radius
    wide = reach - abs(one.centre_x - other.centre_x)
    high = reach - abs(one.centre_y - other.centre_y)
    return max(wide, 0) * max(high, 0) / (2 * min(one.radius, other.radius)) ** 2


def _sample_group(rng: np.random.Generator, labels: tuple[str, ...]) -> tuple[Thing, ...]:
    things: list[Thing] = []
    for label in labels:
        for _ in range(200):  # a free place is found in a few tries; the last try is kept otherwise
            thing = _sample_thing(rng, label, crowd=len(labels))
            if all(_overlap(thing, other) <= _MAX_OVERLAP for other in things):
                break
        things.append(thing)
    return tuple(things)


def sample_scene(seed: int, index: int, *, kind: SceneKind = "single", label: str | None = None) -> Scene:
    """A scene from its seed and index. `label` fixes the class of a single scene, or the word of a word scene."""
    rng = np.random.default_rng([seed, index, 1])
    label = label or _pick(rng, prompts.class_labels())
    things: tuple[Thing, ...] = ()
    if kind == "single":
        things = (_sample_thing(rng, label, crowd=1),)
    elif kind == "group":
        count = int(rng.integers(2, 5))
        drawn = rng.choice(len(prompts.class_labels()), size=count, replace=False)
        things = _sample_group(rng, tuple(prompts.class_labels()[i] for i in drawn))
    return Scene(
        seed=seed,
        index=index,
        kind=kind,
        things=things,
        ground=_pick(rng, prompts.GROUNDS),
        pattern=_pick(rng, prompts.PATTERNS),
        lighting=Lighting.sample(rng),
        word=label if kind == "word" else None,
        has_post=bool(rng.random() < 0.15) and kind == "single",
    )


def with_word(scene: Scene, word: str) -> Scene:
    """The same scene with a word written over it: what the image shows and what it says may contradict."""
    return replace(scene, word=word)


def contradicting_word(scene: Scene) -> str:
    """A class label that differs from the scene's in colour and shape, drawn from the scene's own seed."""
    colour, shape = (scene.label or "red circle").split(" ")
    others = tuple(x for x in prompts.class_labels() if colour not in x and shape not in x)
    return _pick(np.random.default_rng([scene.seed, scene.index, 2]), others)


def draw(scene: Scene, side_px: int = 192) -> Drawing:
    """Draw a scene as a square image of `side_px` pixels."""
    rng = np.random.default_rng([scene.seed, scene.index, side_px, 3])
    thing_shift, ground_shift = rng.uniform(-0.035, 0.035, (2, 3)).astype(
        np.float32
    )  # each image has slightly different colours
    canvas = draw_ground(rng, scene.ground, scene.pattern, side_px, ground_shift)
    boxes = [draw_thing(canvas, rng, thing, thing_shift) for thing in scene.things]
    if scene.has_post:
        draw_post(canvas, rng, scene.things[0])
    if scene.word:
        draw_word(canvas, rng, scene.word, thing=scene.things[0] if scene.things else None)
    pixels = finish(canvas, rng, scene.lighting)
    return Drawing(
        pixels=pixels,
        boxes=np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
        box_captions=tuple(prompts.with_article(thing.label) for thing in scene.things),
    )
