"""Signed distance functions of the demo shapes, and the patterns that fill surfaces. Pure NumPy.

Every shape is about as large as the unit circle (nothing of it is farther than `REACH` from the origin); x points
right and y up. A function takes float32 arrays of one shape and returns the signed distance to the outline in the same
unit: negative inside (exact or a lower bound outside).
The constructions (half-planes, folds, unions by min, cuts by max) are the usual ones of distance-field drawing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

REACH = 1.08
Field = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.88


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.76


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    slanted = np.abs(x) * np.float32(0.8660254) + y * np.float32(0.5)
    return np.maximum(slanted, -y) - 0.5


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    fifth = np.float32(np.pi / 5)
    angle = np.arctan2(x, y)
    folded = np.abs((angle + fifth) % (2 * fifth) - fifth)  # 0 at a tip, π/5 between two tips
    radius = np.hypot(x, y)
    inner_x, inner_y = 0.42 * np.cos(fifth), 0.42 * np.sin(fifth)
    edge = np.hypot(inner_x - 1.0, inner_y)
    normal_x, normal_y = np.float32(inner_y / edge), np.float32((1.0 - inner_x) / edge)
    return (radius * np.cos(folded) - 1.0) * normal_x + radius * np.sin(folded) * normal_y


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    wide, high = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(wide - 0.92, high - 0.3), np.maximum(wide - 0.3, high - 0.92))


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.68) - 0.22


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    wide = np.abs(x)
    tip = (wide + np.abs(y) - 0.76) * np.float32(0.70710678)
    lobe = np.hypot(wide - 0.38, y - 0.38) - 0.5374
    return np.minimum(tip, lobe)


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 0.92, 0.74 - np.hypot(x - 0.42, y))


FIELDS: dict[str, Field] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "crescent": _crescent,
}


def coverage(shape: str, x: np.ndarray, y: np.ndarray, *, pixels_per_unit: float) -> np.ndarray:
    """Share of each pixel that a shape covers, float32 in 0..1, antialiased over one pixel."""
    return np.clip(0.5 - FIELDS[shape](x, y) * np.float32(pixels_per_unit), 0.0, 1.0)


def _wave(phase: np.ndarray, sharpness: float) -> np.ndarray:
    return np.clip(0.5 + sharpness * np.sin(np.float32(2 * np.pi) * phase), 0.0, 1.0)


def pattern(name: str, x: np.ndarray, y: np.ndarray, *, sharpness: float = 3.0) -> np.ndarray:
    """A repeating pattern of period 1, float32 in 0..1 with the shape of `x`; ``plain`` is 0.5 everywhere."""
    if name == "striped":
        return _wave(x, sharpness)
    if name == "checkered":
        both = np.sin(np.float32(np.pi) * x) * np.sin(np.float32(np.pi) * y)
        return np.clip(0.5 + 2 * sharpness * both, 0.0, 1.0)
    if name == "dotted":
        gap = np.hypot(x - np.round(x), y - np.round(y))
        return np.clip(0.5 + 2 * sharpness * (0.3 - gap), 0.0, 1.0)
    if name == "brick":
        shifted = x + 0.5 * (np.floor(2 * y) % 2)
        joint = np.minimum(np.abs(shifted - np.round(shifted)), np.abs(y - np.round(2 * y) / 2) * 1.0)
        return np.clip(2 * sharpness * (joint - 0.05) + 0.5, 0.0, 1.0)
    if name == "zigzag":
        return _wave(y + 0.5 * np.abs(x - np.round(x)) * 2, sharpness)
    return np.full_like(x, 0.5)
