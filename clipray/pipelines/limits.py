"""Bounds on what a row may cost."""

from __future__ import annotations

from dataclasses import dataclass

from clipray.models.preprocess import MAX_PIXELS


@dataclass(frozen=True)
class Limits:
    """What one image may cost.

    Attributes:
        fetch_timeout_s: how long one request may take, its answer included.
        patience: a row may take `patience * fetch_timeout_s`, including repeated requests and the waits between them.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = MAX_PIXELS
    fetch_timeout_s: float = 30.0
    schemes: tuple[str, ...] = ("file",)
    patience: int = 1
