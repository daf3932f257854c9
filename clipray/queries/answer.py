"""What a search answers with. Imports nothing, for commands that only print it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Hit:
    """An answer.

    Attributes:
        score: cosine or dot product, the larger the nearer; by `metric: l2` the squared distance.
        uri: path or URL of the image, "" where no table of the run knows it.
        region_id, box: of a region: its id and x1, y1, x2, y2 in px of the image.
        values: of the columns that were asked for.
    """

    rank: int
    image_id: str
    score: float
    uri: str = ""
    region_id: str | None = None
    box: Box | None = None
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """The hits, nearest first, with the index and its metric."""

    hits: list[Hit]
    index: str
    metric: str


@dataclass(frozen=True)
class Look:
    """An image's labels and probabilities, most probable first, or why it was rejected."""

    image: str
    labels: tuple[tuple[str, float], ...] = ()
    rejected: str = ""
