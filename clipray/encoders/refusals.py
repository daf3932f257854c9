"""What a row may cost, and how it is refused."""

from __future__ import annotations

from dataclasses import dataclass

from clipray.reasons import HttpReason, Reason, Stage


class Refused(Exception):
    """This row cannot become a row of the table."""

    def __init__(self, stage: Stage, reason: Reason | HttpReason, message: str) -> None:
        super().__init__(message)
        self.stage, self.reason, self.message = stage, reason, message[:500]


@dataclass(frozen=True)
class Limits:
    """What one image may cost.

    Attributes:
        fetch_timeout_s: how long one request may take, with all that it brings.
        patience: how often a row may take that long, repeated requests and the waits between them included.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 100_000_000
    fetch_timeout_s: float = 30.0
    schemes: tuple[str, ...] = ("file",)
    patience: int = 1
