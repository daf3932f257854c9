"""Answers as one page of HTML, with the pictures in it."""

from __future__ import annotations

import base64
import io
from typing import Any

from clipray.job import SCHEMES
from clipray.pipelines.decode import decode
from clipray.pipelines.image_fetch import fetch
from clipray.pipelines.limits import Limits
from clipray.queries.search import Answer, Hit
from clipray.tables.reasons import Rejected

SIDE_PX = 320
LIMITS = Limits(schemes=SCHEMES)
MEASURES = {"cosine": "cosine", "dot": "dot product", "l2": "squared distance"}


def search_page(answer: Answer, title: str) -> str:
    """The page, for a file: it needs nothing beside itself."""
    from jinja2 import Environment, PackageLoader

    page = Environment(loader=PackageLoader("clipray.report", "pages"), autoescape=True).get_template("search.html")
    shown = [_shown(hit, MEASURES[answer.metric]) for hit in answer.hits]
    return page.render(title=title, note=f"{len(shown)} answers of {answer.index}", hits=shown)


def _shown(hit: Hit, measure: str) -> dict[str, Any]:
    """What the page needs of a hit; `box` in per cent of the picture: left, top, width, height."""
    facts: dict[str, Any] = {"rank": hit.rank, "image_id": hit.image_id, "score": hit.score, "region_id": hit.region_id}
    facts |= {"measure": measure, "picture": None, "box": None, "missing": "no picture is known"}
    if not hit.uri:
        return facts
    try:
        data, (width, height) = _thumbnail(hit.uri)
    except Rejected as refused:
        return {**facts, "missing": f"{hit.uri} cannot be shown: {refused.reason}"}
    box = None
    if hit.box is not None:
        x1, y1, x2, y2 = hit.box
        sides = (x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height)
        box = [round(100 * share, 2) for share in sides]
    return {**facts, "picture": data, "box": box}


def _thumbnail(uri: str) -> tuple[str, tuple[int, int]]:
    """A JPEG of at most SIDE_PX as base64, and the picture's own width and height as people see it. Raises Refused."""
    image = decode(fetch(uri, LIMITS), LIMITS)
    size = image.size
    image.thumbnail((SIDE_PX, SIDE_PX))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=85)
    return base64.b64encode(sink.getvalue()).decode(), size
