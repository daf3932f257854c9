"""Places of the demo world: unique procedural house fronts, seen from nearer and farther and in other light.

A `Place` is fixed by its seed and index: a sky, a building with a patterned wall, windows, and signs (coloured shapes)
that hang on it. A `View` is one look at it. Everything is computed per pixel, so any zoom is sharp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from clipray.demo import prompts
from clipray.demo.painting import GROUND_RGB, THING_RGB, Lighting, finish, grid, paint, turned
from clipray.demo.shapes import coverage, pattern

Relation = Literal["easy", "hard", "junk"]
RELATIONS: tuple[Relation, ...] = ("easy", "hard", "junk")
WALLS: tuple[str, ...] = ("brick", "striped", "checkered", "zigzag", "dotted", "plain")
_SPOTS = ((-0.5, 0.35), (0.5, 0.35), (0.0, 0.0), (-0.5, -0.4), (0.5, -0.4))
ROOFS: tuple[str, ...] = ("gable", "dome", "flat", "twin")


@dataclass(frozen=True)
class Sign:
    """A coloured shape on the front, in place units (the front spans about -1..1, y up)."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    turn_rad: float


@dataclass(frozen=True)
class Place:
    """A building: colours, wall pattern and its period, roof, rows and columns of windows, signs."""

    place_id: str
    seed: int
    index: int
    sky: str
    wall: str
    wall_colour: str
    trim_colour: str
    period: float
    roof: str
    windows: tuple[int, int]
    signs: tuple[Sign, ...]

    @property
    def captions(self) -> tuple[str, ...]:
        signs = [prompts.with_article(f"{sign.colour} {sign.shape}") for sign in self.signs[:2]]
        house = f"a {self.wall_colour} house with {' and '.join(signs)}"
        return (
            house,
            f"a {self.wall_colour} house with {self.trim_colour} {self.wall} walls and a {self.roof} roof",
            f"a {self.wall} {self.wall_colour} house under a {self.sky} sky",
        )


@dataclass(frozen=True)
class View:
    """A look at a place. `centre_x`, `centre_y` in place units, `zoom`: image side over front width; the light."""

    relation: Relation
    number: int
    centre_x: float
    centre_y: float
    zoom: float
    turn_rad: float
    slant: float
    hidden: float
    lighting: Lighting


def _names(rng: np.random.Generator, names: tuple[str, ...], count: int) -> list[str]:
    return [names[i] for i in rng.choice(len(names), size=count, replace=False)]


def sample_place(seed: int, index: int) -> Place:
    """A place from its seed and index."""
    rng = np.random.default_rng([seed, index, 4])
    sky, wall_colour, trim_colour = _names(rng, prompts.GROUNDS, 3)
    spots = rng.permutation(_SPOTS)[: int(rng.integers(2, 5))]
    kinds, colours = _names(rng, prompts.SHAPES, len(spots)), _names(rng, prompts.COLOURS, len(spots))
    signs = tuple(
        Sign(kind, colour, float(x), float(y), float(rng.uniform(0.2, 0.3)), float(rng.uniform(-0.4, 0.4)))
        for kind, colour, (x, y) in zip(kinds, colours, spots, strict=True)
    )
    return Place(
        place_id=f"place-{seed}-{index:05d}",
        seed=seed,
        index=index,
        sky=sky,
        wall=_names(rng, WALLS, 1)[0],
        wall_colour=wall_colour,
        trim_colour=trim_colour,
        period=float(rng.uniform(0.16, 0.34)),
        roof=_names(rng, ROOFS, 1)[0],
        windows=(int(rng.integers(1, 4)), int(rng.integers(2, 5))),
        signs=signs,
    )


def sample_view(place: Place, number: int, *, relation: Relation) -> View:
    """A look at a place: easy shows most of it, hard less of it in harsher light, junk next to nothing of it."""
    rng = np.random.default_rng([place.seed, place.index, number, RELATIONS.index(relation), 5])
    reach, zoom_low, zoom_high, turn = {
        "easy": (0.15, 0.75, 1.1, 0.1),
        "hard": (0.4, 1.1, 1.8, 0.3),
        "junk": (0.8, 3.2, 4.5, 0.5),
    }[relation]
    centre_x, centre_y = rng.uniform(-reach, reach, size=2)
    return View(
        relation=relation,
        number=number,
        centre_x=float(centre_x),
        centre_y=float(centre_y),
        zoom=float(rng.uniform(zoom_low, zoom_high)),
        turn_rad=float(rng.uniform(-turn, turn)),
        slant=float(rng.uniform(-turn, turn)),
        hidden=float(rng.uniform(0.15, 0.3)) if relation == "hard" and rng.random() < 0.5 else 0.0,
        lighting=Lighting.sample(rng, harsh=relation != "easy"),
    )


def _front(place: Place, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the building's outline in place units."""
    body = np.maximum(np.abs(x) - 0.85, np.abs(y + 0.25) - 0.85)
    if place.roof == "gable":
        return np.minimum(body, np.maximum((np.abs(x) * 0.55 + y - 1.1) * 0.876, -y))
    if place.roof == "dome":
        return np.minimum(body, np.hypot(x, (y - 0.55) * 1.3) - 0.6)
    if place.roof == "twin":
        return np.minimum(body, np.maximum(np.abs(np.abs(x) - 0.62) - 0.2, np.abs(y - 0.5) - 0.5))
    return body


def draw_view(place: Place, view: View, side_px: int = 192) -> np.ndarray:
    """Draw a look at a place: uint8 [side_px, side_px, 3]."""
    rng = np.random.default_rng([place.seed, place.index, view.number, side_px, 6])
    across, down = grid(side_px)
    span = np.float32(2.2 / view.zoom)
    x, y = turned((across - 0.5) * span, (0.5 - down) * span, view.turn_rad)
    x = x * np.float32(1 + 0.3 * abs(view.slant)) + y * np.float32(view.slant * 0.5) + np.float32(view.centre_x)
    y = y + np.float32(view.centre_y)
    pixels_per_unit = side_px / float(span)
    names = (place.sky, place.wall_colour, place.trim_colour)
    sky, wall, trim = (np.asarray(GROUND_RGB[name], np.float32) for name in names)
    canvas = sky * (0.9 + 0.25 * y[..., None]).astype(np.float32)
    surface = pattern(place.wall, x / place.period, y / place.period)[..., None].astype(np.float32)
    tone = (0.55 + 0.45 * surface) if place.wall != "plain" else np.float32(1.0)
    outline = _front(place, x, y)
    front = np.clip(0.5 - outline * pixels_per_unit, 0, 1)
    edge = np.clip(0.5 - (np.abs(outline) - 0.035) * pixels_per_unit, 0, 1)
    paint(canvas, front, wall * tone + trim * (1 - tone) * 0.8)
    rows, columns = place.windows
    u, v = (x + 0.85) / 1.7 * columns, (y + 1.1) / 1.7 * rows
    gap = np.maximum(np.abs(u % 1 - 0.5) - 0.24, np.abs(v % 1 - 0.5) - 0.3)
    inside = (np.abs(x) < 0.8) & (np.abs(y + 0.25) < 0.8)
    paint(canvas, np.clip(0.5 - gap * pixels_per_unit / 2, 0, 1) * inside, trim)
    paint(canvas, edge, trim * 0.7)
    for sign in place.signs:
        s, t = turned((x - sign.x) / sign.radius, (y - sign.y) / sign.radius, sign.turn_rad)
        cover = coverage(sign.shape, s, t, pixels_per_unit=sign.radius * pixels_per_unit)
        paint(canvas, cover, np.asarray(THING_RGB[sign.colour], np.float32))
    if view.hidden:
        side = float(rng.uniform(-0.4, 0.4))
        post = np.broadcast_to(np.abs(across - 0.5 - side) < view.hidden / 2, (side_px, side_px))
        paint(canvas, post.astype(np.float32), np.full(3, 0.2, np.float32))
    return finish(canvas.astype(np.float32), rng, view.lighting)
