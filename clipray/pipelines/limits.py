"""What a row may cost."""

from __future__ import annotations

from dataclasses import dataclass

from clipray.models.preprocess import MAX_PIXELS


@dataclass(frozen=True)
class Limits:
    """What one image may cost.

    Attributes:
        fetch_timeout_s: how long one request may take, with all that it brings.
        patience: how often a row may take that long, repeated requests and the waits between them included.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = MAX_PIXELS
    fetch_timeout_s: float = 30.0
    schemes: tuple[str, ...] = ("file",)
    patience: int = 1
