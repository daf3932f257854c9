"""How the demo world is painted: grounds, things, words and light on a float32 canvas [height, width, 3] in 0..1."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from clipray.demo.shapes import REACH, coverage, pattern

THING_RGB: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.52, 0.05),
    "yellow": (0.97, 0.90, 0.12),
    "green": (0.13, 0.66, 0.20),
    "cyan": (0.15, 0.82, 0.88),
    "blue": (0.14, 0.27, 0.90),
    "pink": (0.96, 0.45, 0.76),
    "white": (0.97, 0.97, 0.97),
}
GROUND_RGB: dict[str, tuple[float, float, float]] = {
    "gray": (0.50, 0.50, 0.51),
    "black": (0.07, 0.07, 0.08),
    "brown": (0.42, 0.26, 0.14),
    "navy": (0.09, 0.11, 0.34),
    "olive": (0.42, 0.43, 0.16),
    "teal": (0.06, 0.36, 0.37),
    "maroon": (0.36, 0.06, 0.15),
    "beige": (0.80, 0.72, 0.57),
}


@dataclass(frozen=True)
class Thing:
    """One coloured shape. `centre_x`, `centre_y`, `radius`: shares of the side, y down; `turn_rad`: anticlockwise."""

    shape: str
    colour: str
    texture: str
    size: str
    centre_x: float
    centre_y: float
    radius: float
    turn_rad: float

    @property
    def label(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Lighting:
    """The light and the camera: overall gain, its slope across the image, warmth, noise and blur.

    `noise` is the standard deviation in shares of full white, `blur` the Gaussian radius as a share of the side.
    """

    gain: float
    slope_x: float
    slope_y: float
    warmth: float
    noise: float
    blur: float

    @classmethod
    def sample(cls, rng: np.random.Generator, *, harsh: bool = False) -> Lighting:
        low, high = (0.55, 1.3) if harsh else (0.78, 1.15)
        return cls(
            gain=float(rng.uniform(low, high)),
            slope_x=float(rng.uniform(-0.2, 0.2)),
            slope_y=float(rng.uniform(-0.2, 0.2)),
            warmth=float(rng.uniform(-0.06, 0.06)),
            noise=float(rng.uniform(0.0, 0.05)),
            blur=float(rng.uniform(0.0, 0.012)) if rng.random() < 0.5 else 0.0,
        )


@lru_cache(maxsize=64)
def grid(side_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres as shares of the side: x [1, side] and y [side, 1], float32, read-only."""
    steps = ((np.arange(side_px) + 0.5) / side_px).astype(np.float32)
    steps.flags.writeable = False
    return steps[None, :], steps[:, None]


def turned(x: np.ndarray, y: np.ndarray, turn_rad: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates seen from a frame turned by `turn_rad`."""
    cos, sin = np.float32(np.cos(turn_rad)), np.float32(np.sin(turn_rad))
    return cos * x + sin * y, cos * y - sin * x


def clouds(rng: np.random.Generator, side_px: int, cells: int = 5) -> np.ndarray:
    """Smooth noise, float32 [side, side] in 0..1: a coarse random grid, enlarged."""
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32), mode="F")
    return np.clip(np.asarray(coarse.resize((side_px, side_px), Image.Resampling.BICUBIC)), 0.0, 1.0)


def paint(canvas: np.ndarray, cover: np.ndarray, rgb: np.ndarray | np.float32) -> None:
    """Blend a colour, or a shade of grey, into a canvas by the share of each pixel [height, width] that it covers."""
    canvas += cover[..., None] * (rgb - canvas)


def draw_ground(rng: np.random.Generator, name: str, pattern_name: str, side_px: int, shift: np.ndarray) -> np.ndarray:
    """A new canvas filled with a ground colour, to which the float32 RGB `shift` is added, and its pattern."""
    x, y = grid(side_px)
    turn, period = float(rng.uniform(-np.pi, np.pi)), float(rng.uniform(0.09, 0.2))
    if pattern_name == "cloudy":
        field = clouds(rng, side_px)
    elif pattern_name == "shaded":
        field = turned(x - 0.5, y - 0.5, turn)[0] + 0.5
    else:
        u, v = turned(x - 0.5, y - 0.5, turn)
        field = pattern(pattern_name, u / period, v / period)
    rgb = np.asarray(GROUND_RGB[name], np.float32) + shift
    tone = 0.8 + 0.4 * field.astype(np.float32)
    return np.clip(rgb, 0.02, 1.0) * np.broadcast_to(tone, (side_px, side_px))[..., None] + np.float32(0.05) * (
        np.broadcast_to(field, (side_px, side_px))[..., None] - np.float32(0.5)
    )


def _window(centre: float, reach: float, side_px: int) -> slice:
    return slice(max(int((centre - reach) * side_px) - 1, 0), min(int((centre + reach) * side_px) + 2, side_px))


def _extent(mask: np.ndarray, across: int, offset: int) -> tuple[int, int]:
    hits = np.flatnonzero(mask.any(axis=across))
    return int(hits[0]) + offset, int(hits[-1]) + 1 + offset


def draw_thing(canvas: np.ndarray, rng: np.random.Generator, thing: Thing, shift: np.ndarray) -> list[int]:
    """Paint a thing, its colour plus the float32 RGB `shift`.

    Returns:
        Its box in pixels, xyxy, half-open: all pixels covered by half or more.
    """
    side_px = canvas.shape[0]
    rows, columns = (_window(at, REACH * thing.radius, side_px) for at in (thing.centre_y, thing.centre_x))
    x, y = grid(side_px)
    across, down = (x[:, columns] - thing.centre_x) / thing.radius, (y[rows] - thing.centre_y) / thing.radius
    u, v = turned(across, -down, thing.turn_rad)
    cover = coverage(thing.shape, u, v, pixels_per_unit=thing.radius * side_px)
    tone = 0.93 + 0.1 * v  # lit from above
    if thing.texture != "plain":
        repeats = float(rng.uniform(2.0, 3.0))
        tone = tone * (1 - 0.36 * (1 - pattern(thing.texture, u * repeats, v * repeats)))
    rgb = np.clip(np.asarray(THING_RGB[thing.colour], np.float32) + shift, 0, 1)
    paint(canvas[rows, columns], cover, tone[..., None] * rgb)
    solid = cover >= 0.5
    left, right = _extent(solid, 0, columns.start)
    top, bottom = _extent(solid, 1, rows.start)
    return [left, top, right, bottom]


def draw_post(canvas: np.ndarray, rng: np.random.Generator, thing: Thing) -> None:
    """Hide a part of a thing behind a dark post."""
    side_px = canvas.shape[0]
    x, y = grid(side_px)
    u, _ = turned(x - thing.centre_x, y - thing.centre_y, float(rng.uniform(-0.4, 0.4)))
    width = thing.radius * float(rng.uniform(0.18, 0.3))
    shift = thing.radius * float(rng.uniform(-0.7, 0.7))
    cover = np.clip(0.5 - (np.abs(u - shift) - width / 2) * side_px, 0.0, 1.0)
    paint(canvas, cover, np.float32(rng.uniform(0.12, 0.3)))


@lru_cache(maxsize=1024)
def _lettering(word: str, font_px: int) -> np.ndarray:
    """A word as ink coverage, uint8 [height, width], one line for each of its parts."""
    font, text = ImageFont.load_default(font_px), "\n".join(word.split(" "))
    probe = ImageDraw.Draw(Image.new("L", (1, 1)))
    left, top, right, bottom = probe.multiline_textbbox((0, 0), text, font=font, align="center", spacing=font_px // 8)
    pad = font_px // 4
    plate = Image.new("L", (int(right - left) + 2 * pad, int(bottom - top) + 2 * pad))
    where = (pad - left, pad - top)
    ImageDraw.Draw(plate).multiline_text(where, text, fill=255, font=font, align="center", spacing=font_px // 8)
    return np.asarray(plate)


def _free_spot(rng: np.random.Generator, height: int, width: int, side_px: int, thing: Thing | None) -> tuple[int, int]:
    """Top and left of a plate inside the image: of twelve tries, the one that hides least of the thing."""
    spots = rng.integers(0, (side_px - height + 1, side_px - width + 1), size=(12, 2))
    if thing is None:
        return int(spots[0, 0]), int(spots[0, 1])
    centre = np.array([thing.centre_y, thing.centre_x]) * side_px
    low, high = centre - thing.radius * side_px, centre + thing.radius * side_px
    shared = np.minimum(spots + np.array([height, width]), high) - np.maximum(spots, low)
    best = int(np.argmin(np.clip(shared, 0, None).prod(axis=1)))
    return int(spots[best, 0]), int(spots[best, 1])


def draw_word(canvas: np.ndarray, rng: np.random.Generator, word: str, *, thing: Thing | None) -> None:
    """Write a word on a plate, dark on light or light on dark, a little turned, beside a thing where there is room."""
    side_px = canvas.shape[0]
    longest = max(len(part) for part in word.split(" "))
    share = float(rng.uniform(0.52, 0.72) if thing else rng.uniform(0.56, 0.92))  # of the side
    ink = Image.fromarray(_lettering(word, max(int(side_px * share / (0.62 * longest + 0.5)), 6)))
    plate = Image.new("L", ink.size, 255)
    turn = float(rng.uniform(-10, 10))
    ink, plate = (layer.rotate(turn, Image.Resampling.BICUBIC, expand=True) for layer in (ink, plate))
    height, width = min(ink.height, side_px), min(ink.width, side_px)
    top, left = _free_spot(rng, height, width, side_px, thing)
    on, under = (np.float32(0.05), np.float32(0.93)) if rng.random() < 0.5 else (np.float32(0.95), np.float32(0.06))
    patch = canvas[top : top + height, left : left + width]
    for layer, value in ((plate, under), (ink, on)):
        paint(patch, np.asarray(layer, np.float32)[:height, :width] / 255, value)


def finish(canvas: np.ndarray, rng: np.random.Generator, lighting: Lighting) -> np.ndarray:
    """Light, blur and noise; returns uint8 [height, width, 3]."""
    side_px = canvas.shape[0]
    x, y = grid(side_px)
    light = np.float32(lighting.gain) * (1 + lighting.slope_x * (x - 0.5) + lighting.slope_y * (y - 0.5))
    tint = np.asarray([1 + lighting.warmth, 1.0, 1 - lighting.warmth], np.float32)
    lit: np.ndarray = canvas * light[..., None].astype(np.float32) * tint
    if lighting.blur:
        image = Image.fromarray((np.clip(lit, 0, 1) * 255).astype(np.uint8))
        lit = np.asarray(image.filter(ImageFilter.GaussianBlur(lighting.blur * side_px)), np.float32) / 255
    if lighting.noise:
        grain = rng.standard_normal((*lit.shape[:2], 1), dtype=np.float32)
        hue = rng.standard_normal((side_px // 2, side_px // 2, 3), dtype=np.float32)
        lit = lit + np.float32(lighting.noise) * grain
        lit[: side_px // 2 * 2, : side_px // 2 * 2] += np.float32(lighting.noise / 2) * hue.repeat(2, 0).repeat(2, 1)
    return (np.clip(lit, 0, 1) * 255 + 0.5).astype(np.uint8)
