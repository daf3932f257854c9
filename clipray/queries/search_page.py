"""An answer as one HTML page that contains its images."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from clipray.job import SCHEMES
from clipray.pipelines.decode import decode
from clipray.pipelines.image_fetch import fetch
from clipray.pipelines.spec import Limits
from clipray.queries.answer import Answer, Hit
from clipray.tables.reasons import Rejected

SIDE_PX = 320
LIMITS = Limits(schemes=SCHEMES)
MEASURES = {"cosine": "cosine", "dot": "dot product", "l2": "squared distance"}


@dataclass(frozen=True)
class Shown:
    """A hit on the page.

    Attributes:
        image: a JPEG as base64; missing: why there is none.
        box: of a region, in per cent of the image: left, top, width, height.
    """

    hit: Hit
    image: str = ""
    missing: str = ""
    box: tuple[float, ...] | None = None


def search_page(answer: Answer, title: str) -> str:
    """The page as HTML. It needs no other files."""
    from jinja2 import Environment, PackageLoader

    page = Environment(loader=PackageLoader("clipray.report", "pages"), autoescape=True).get_template("search.html")
    note, measure = f"{len(answer.hits)} answers of {answer.index}", MEASURES[answer.metric]
    return page.render(title=title, note=note, measure=measure, answers=[_shown(hit) for hit in answer.hits])


def _shown(hit: Hit) -> Shown:
    if not hit.uri:
        return Shown(hit, missing="no image is known")
    try:
        data, (width, height) = _thumbnail(hit.uri)
    except Rejected as rejected:
        return Shown(hit, missing=f"{hit.uri} cannot be shown: {rejected.reason}")
    if hit.box is None:
        return Shown(hit, data)
    x1, y1, x2, y2 = hit.box
    shares = x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height
    return Shown(hit, data, box=tuple(round(100 * share, 2) for share in shares))


def _thumbnail(uri: str) -> tuple[str, tuple[int, int]]:
    """A JPEG of at most SIDE_PX as base64, and the image's own width and height as people see it. Raises Rejected."""
    image = decode(fetch(uri, LIMITS), LIMITS)
    size = image.size
    image.thumbnail((SIDE_PX, SIDE_PX))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=85)
    return base64.b64encode(sink.getvalue()).decode(), size
